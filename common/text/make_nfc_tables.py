#!/usr/bin/env python3
"""Writes common/text/nfc_tables.inc: what Normalization Form C needs of the Unicode character database.

  python3 common/text/make_nfc_tables.py         # from the repository root; Python 3.11 knows Unicode 14

The forms of assigned characters never change (Unicode stability policy), so newer tables only add characters.
"""

import os
import sys
import unicodedata

OUTPUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "nfc_tables.inc")
HANGUL = range(0xAC00, 0xD7A4)


def write_table(file, declaration, entries):
  file.write(f"{declaration} = {{\n")
  line = "   "
  for entry in entries:
    if len(line) + len(entry) + 2 > 120:
      file.write(line + "\n")
      line = "   "
    line += f" {entry},"
  file.write(line + "\n};\n")


def main():
  decompositions = []
  classes = []
  for code in range(sys.maxunicode + 1):
    combining_class = unicodedata.combining(chr(code))
    if combining_class:
      if classes and classes[-1][1] == code - 1 and classes[-1][2] == combining_class:
        classes[-1][1] = code
      else:
        classes.append([code, code, combining_class])
    mapping = unicodedata.decomposition(chr(code))
    if not mapping or mapping.startswith("<") or code in HANGUL:
      continue
    parts = [int(part, 16) for part in mapping.split()] + [0]
    composes = unicodedata.normalize("NFC", chr(code)) == chr(code)
    decompositions.append(f"{{{code:#x}, {parts[0]:#x}, {parts[1]:#x}, {int(composes)}}}")
  with open(OUTPUT, "w", encoding="ascii", newline="\n") as file:
    file.write(f"// Made by make_nfc_tables.py from Unicode {unicodedata.unidata_version}. Do not edit.\n\n")
    file.write("// Character, the one or two characters it decomposes to (0: none), whether those compose to it.\n")
    write_table(file, "constexpr Decomposition kDecompositions[]", decompositions)
    file.write("\n// First and last character, their canonical combining class.\n")
    write_table(file, "constexpr CombiningRange kCombiningRanges[]", (f"{{{a:#x}, {b:#x}, {c}}}" for a, b, c in classes))


if __name__ == "__main__":
  main()
