#!/usr/bin/env python3
"""Makes the fixtures of tests/text: what the reference tokenizer does with many varied strings.

  pip install tokenizers==0.23.3
  python3 tests/text/make_fixtures.py            # from the repository root; writes tests/text/data

The reference is Hugging Face `tokenizers`. Output is the same on every run.

  texts.jsonl               one JSON string per line
  NAME.tokenizer.json       small tokenizers, trained here on deploy/models/text/calibration.txt
  NAME.ids                  one line per text (see STEP): its ids, two base-64 digits each
  NAME.plain.ids            every STEP-th text with add_special_tokens off and special tokens not parsed
  NAME.decode.jsonl         [ids, text without special tokens, text with them] for random ids

Code points that Unicode 14 does not assign are left out: PCRE2 10.42, the oldest version that Nibble supports, knows Unicode 14,
the reference's Oniguruma knows a newer one. Its normalizer in turn is older: combining marks of Unicode 14 (U+1AC1..U+1ACE) keep
the place they had in the text there, so MARKS stops before them.
"""

import json
import os
import random
import string
import unicodedata

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
DATA = os.path.join(ROOT, "tests", "text", "data")
CALIBRATION = os.path.join(ROOT, "deploy", "models", "text", "calibration.txt")
BUNDLED = os.path.join(ROOT, "deploy", "models", "novelist-17m", "tokenizer.json")

NUM_TEXTS = 10500
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def assigned(first, last):
  return [chr(c) for c in range(first, last + 1) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]


SCRIPTS = [
    assigned(0x20, 0x7E), assigned(0xA0, 0xFF), assigned(0x100, 0x24F), assigned(0x370, 0x3FF), assigned(0x400, 0x4FF),
    assigned(0x531, 0x587), assigned(0x590, 0x5FF), assigned(0x600, 0x6FF), assigned(0x900, 0x97F), assigned(0xE00, 0xE7F),
    assigned(0x10A0, 0x10FF), assigned(0x1100, 0x11FF), assigned(0x13A0, 0x13FF), assigned(0x1E00, 0x1EFF),
    assigned(0x3040, 0x30FF), assigned(0x4E00, 0x9FFF), assigned(0xAC00, 0xD7A3), assigned(0x10330, 0x1034A),
    assigned(0x12000, 0x12399), assigned(0x1D400, 0x1D7FF), assigned(0x20000, 0x2A6DF),
]
MARKS = assigned(0x300, 0x36F) + assigned(0x1AB0, 0x1ABE) + assigned(0x20D0, 0x20F0) + assigned(0xFE00, 0xFE0F)
SPACES = list("    \t\n\n\r\v\f\x1c\x1f\x85\xa0\u1680\u180e\u2000\u2003\u200a\u2028\u2029\u202f\u205f\u3000\u200b\u2060\ufeff")
CONTROLS = [chr(c) for c in range(0x20)] + [chr(c) for c in range(0x7F, 0xA0)] + list("\u00ad\u200c\u200d\u200e\u200f\u202a\u202e\u2066\ufff9")
DECOMPOSABLE = [c for c in assigned(0xC0, 0x2FA1D) if unicodedata.normalize("NFD", c) != c]
EMOJI = assigned(0x1F300, 0x1F64F) + assigned(0x1F900, 0x1F9FF) + assigned(0x2600, 0x27BF)
NUMBERS = [c for first, last in ((0x30, 0x39), (0xB2, 0xBE), (0x660, 0x669), (0x966, 0x96F), (0x2150, 0x2189), (0x2460, 0x249B),
                                 (0x3021, 0x3029), (0xFF10, 0xFF19), (0x1D7CE, 0x1D7FF))
           for c in assigned(first, last) if unicodedata.category(c)[0] == "N"]
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|endoftext|>",
            "<mask>", "<pad>", "<tool_call>", "<tool", "<|eot_id", "<|", "|>", "<|eot_id|>>", "<<|eot_id|>"]
CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'T", "'RE", "'vE", "'M", "'LL", "'D", "'ſ", "’s", "'x", "''s", "'sS"]
CODE = ["def f(x):\n    return x**2  # ²\n", "for (int i = 0; i < n; ++i) {\n\ta[i] += b[i];\n}\n", "SELECT * FROM t WHERE a='b';",
        "{\"key\": [1, 2.5e-3, null]}", "<div class=\"x\">&nbsp;</div>", "fn main() -> Result<(), E> {\r\n    Ok(())\r\n}\r\n",
        "https://example.org/a/b?c=d&e=%20#f", "\\begin{equation}\n  \\alpha_{i}^{2}\n\\end{equation}", "if [ -n \"$X\" ]; then echo $((1+2)); fi",
        "0x1F, 0b1010, 1_000_000, 3.14159, -1e+10, 12345678901234567890"]


def words(rng, prose):
  start = rng.randrange(len(prose) - 400)
  return prose[start:start + rng.choice((5, 12, 25, 60))]


def fragment(rng, prose, every):
  kind = rng.randrange(18)
  n = rng.choice((1, 1, 2, 3, 5, 8))
  if kind <= 2:
    return words(rng, prose)
  if kind == 3:
    script = rng.choice(SCRIPTS)
    return "".join(rng.choice(script) for _ in range(n))
  if kind == 4:
    script = rng.choice(SCRIPTS)
    return "".join(rng.choice(script) + rng.choice(MARKS) * rng.randrange(3) for _ in range(n))
  if kind == 5:
    return "".join(rng.choice(SPACES) for _ in range(n))
  if kind == 6:
    return rng.choice(SPACES) * rng.choice((1, 2, 3, 4, 7, 17))
  if kind == 7:
    return "".join(rng.choice(CONTROLS) for _ in range(n))
  if kind == 8:
    return rng.choice(("", "\ufe0f", "\u200d")).join(rng.choice(EMOJI) + rng.choice(("", "\U0001F3FD")) for _ in range(n))
  if kind == 9:
    return "".join(rng.choice(assigned(0x1F1E6, 0x1F1FF)) for _ in range(n))
  if kind == 10:
    return "".join(rng.choice(NUMBERS) for _ in range(rng.choice((1, 2, 3, 4, 7, 11))))
  if kind == 11:
    return rng.choice(SPECIALS)
  if kind == 12:
    return rng.choice(("he", "É", "日", "ق", "1", " ", "")) + rng.choice(CONTRACTIONS) + rng.choice(("", "x", " "))
  if kind == 13:
    return rng.choice(CODE)
  if kind == 14:
    return "".join(rng.choice(string.punctuation) for _ in range(n))
  if kind == 15:
    return "".join(rng.choice(every) for _ in range(n))
  if kind == 16:
    text = "".join(rng.choice(DECOMPOSABLE) for _ in range(n))
    return unicodedata.normalize(rng.choice(("NFC", "NFD", "NFD", "NFD")), text) + rng.choice(("", rng.choice(MARKS)))
  return rng.choice(string.ascii_letters) * rng.choice((2, 5, 39, 40, 41, 64, 90))


def make_texts():
  rng = random.Random(14)
  with open(CALIBRATION, encoding="utf-8", newline="") as file:
    prose = file.read()
  every = assigned(0, 0x10FFFF)
  texts = ["", " ", "\n", "a", "\x00", "\U0010FFFD"]
  texts += [c for c in CONTRACTIONS + SPECIALS + SPACES + CODE]
  while len(texts) < NUM_TEXTS:
    texts.append("".join(fragment(rng, prose, every) for _ in range(rng.choice((1, 1, 2, 2, 3, 4)))))
  return texts


def train(pre_tokenizer, vocab_size, specials, ignore_merges=False):
  tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
  tokenizer.pre_tokenizer = pre_tokenizer
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train([CALIBRATION], trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, special_tokens=specials,
                                                    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  return tokenizer


def split(pattern, behavior="isolated", invert=False):
  return pre_tokenizers.Split(Regex(pattern), behavior=behavior, invert=invert)


def byte_level(**options):
  return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "use_regex": False, **options})


def make_gpt2():
  tokenizer = train(byte_level(use_regex=True), 700, [AddedToken("<|endoftext|>", special=True, normalized=True)])
  tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
  return tokenizer


def make_gpt2_prefix():
  """add_prefix_space, stripping added tokens, ids on both sides."""
  tokenizer = train(byte_level(use_regex=True, add_prefix_space=True), 600, ["<|begin_of_text|>", "<|endoftext|>"])
  tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True), AddedToken("<pad>", rstrip=True)])
  tokenizer.add_tokens([AddedToken("<tool_call>", normalized=True), AddedToken("<tool", lstrip=True, rstrip=True), "qu", "\u3000"])
  tokenizer.post_processor = processors.TemplateProcessing(
      single="<|begin_of_text|> $A <|endoftext|>",
      special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("<|begin_of_text|>", "<|endoftext|>")])
  return tokenizer


def make_ignore_merges():
  """ignore_merges decides for many tokens here: a third of the merges is missing."""
  tokenizer = train(pre_tokenizers.Sequence([split(LLAMA3), byte_level()]), 1500, ["<|eot_id|>"], ignore_merges=True)
  description = json.loads(tokenizer.to_str())
  description["model"]["merges"] = [merge for i, merge in enumerate(description["model"]["merges"]) if i < 200 or i % 3]
  return Tokenizer.from_str(json.dumps(description))


def make_stages():
  """Several splits behind one another, digits, o200k's pattern; merges in the older "a b" form."""
  stages = [pre_tokenizers.Digits(individual_digits=True), split("[一-龥぀-ゟ゠-ヿ]+"), split(O200K), split(r"x", "removed"),
            split(r".+", "removed", True), byte_level()]
  return train(pre_tokenizers.Sequence(stages), 600, ["<|eot_id|>", "<|end_of_text|>"])


def make_qwen2():
  """Normalization Form C in front, also of added tokens."""
  tokenizer = train(pre_tokenizers.Sequence([split(QWEN2, "removed", True), byte_level()]), 500, ["<|endoftext|>"])
  tokenizer.normalizer = normalizers.NFC()
  tokenizer.add_tokens([AddedToken("e\u0301t", normalized=True), AddedToken("o\u0308", normalized=False)])
  return tokenizer


# The bundled tokenizer encodes every text, these and the plain mode every STEP-th.
TOKENIZERS = [("gpt2", make_gpt2), ("gpt2_prefix", make_gpt2_prefix), ("ignore_merges", make_ignore_merges),
              ("stages", make_stages), ("qwen2", make_qwen2)]
STEP = 12


def digits(ids):
  return "".join(DIGITS[i >> 6] + DIGITS[i & 63] for i in ids)


def write_lines(name, lines):
  with open(os.path.join(DATA, name), "w", encoding="utf-8", newline="\n") as file:
    file.writelines(line + "\n" for line in lines)


def write_expectations(name, tokenizer, texts, plain_texts):
  assert tokenizer.get_vocab_size() <= 64 * 64
  write_lines(f"{name}.ids", (digits(tokenizer.encode(t).ids) for t in texts))
  tokenizer.encode_special_tokens = True
  write_lines(f"{name}.plain.ids", (digits(tokenizer.encode(t, add_special_tokens=False).ids) for t in plain_texts))
  tokenizer.encode_special_tokens = False


def write_decodings(name, tokenizer, count):
  rng = random.Random(15)
  size = tokenizer.get_vocab_size()
  lines = []
  for _ in range(count):
    # Bytes are the first tokens behind the special ones: mixed with words they make every kind of broken character.
    ids = [rng.randrange(rng.choice((8, 264, 264, size))) for _ in range(rng.randrange(1, 12))]
    lines.append(json.dumps([digits(ids), tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=False)],
                            ensure_ascii=False, separators=(",", ":")))
  write_lines(f"{name}.decode.jsonl", lines)


def main():
  os.makedirs(DATA, exist_ok=True)
  texts = make_texts()
  write_lines("texts.jsonl", (json.dumps(t, ensure_ascii=False) for t in texts))
  bundled = Tokenizer.from_file(BUNDLED)
  write_expectations("llama3", bundled, texts, texts[::STEP])
  write_decodings("llama3", bundled, 1000)
  for name, make in TOKENIZERS:
    tokenizer = make()
    description = json.loads(tokenizer.to_str())
    if name == "stages":
      description["model"]["merges"] = [" ".join(merge) for merge in description["model"]["merges"]]
    write_lines(f"{name}.tokenizer.json", [json.dumps(description, ensure_ascii=False, separators=(",", ":"))])
    tokenizer = Tokenizer.from_file(os.path.join(DATA, f"{name}.tokenizer.json"))
    write_expectations(name, tokenizer, texts[::STEP], texts[::STEP])
    write_decodings(name, tokenizer, 200)


if __name__ == "__main__":
  main()
