"""Dependencies point one way (docs/architecture.md). Reads every #include and every CMake link of the repository.

common/base <- other common/* <- router, worker; kernels sees only common/base; router never sees kernels or worker; gRPC,
protobuf and CUDA headers stay in the folders that own them. tools and tests may use everything.
"""

import pathlib
import re
import sys
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAYERS = ["common", "kernels", "worker", "router", "tools", "tests", "proto"]
SUFFIXES = {".h", ".cc", ".cu", ".cuh", ".inc"}

# folder -> folders it may use; the longest matching prefix of a file's path decides.
MAY_USE = {
    "proto": ["proto"],
    "common": ["common", "proto"],
    "common/base": ["common/base"],
    "kernels": ["kernels", "common/base"],
    "worker": ["worker", "kernels", "common", "proto"],
    "router": ["router", "common", "proto"],
    "tools": ["tools", "router", "worker", "kernels", "common", "proto"],
    "tests": ["tests", "tools", "router", "worker", "kernels", "common", "proto"],
}

# kind of foreign header -> (pattern, folders that may include it, folders inside those that may not)
FOREIGN = {
    "gRPC": (
        re.compile(r"grpc(pp)?/|.*\.grpc\.pb\.h$"),
        ["common/rpc", "router", "worker", "tools", "tests"],
        ["worker/model", "worker/comm"],
    ),
    "CUDA": (
        re.compile(r"(cuda|cublas|cutlass|cute/|nccl|nvrtc|nvml|nvtx)"),
        ["kernels/cuda", "worker/comm/nccl_communicator", "tools/quantize/cuda", "tests/kernels"],
        [],
    ),
}

INCLUDE = re.compile(r'^\s*#\s*include\s*["<]([^">]+)[">]', re.M)
CALL = re.compile(r"\b(nibble_library|nibble_binary|nibble_test|add_library|add_executable|target_link_libraries)\s*\(([^)]*)\)")
KEYWORDS = {"NAME", "SRCS", "LIBS", "GRPC", "LABEL", "TIMEOUT", "PUBLIC", "PRIVATE", "INTERFACE", "STATIC", "SHARED", "ALIAS", "IMPORTED"}


def under(path, folder):
    return path == folder or path.startswith(folder + "/") or (folder.count("/") > 1 and path.startswith(folder))


def allowed(path):
    matches = [folder for folder in MAY_USE if under(path, folder)]
    return MAY_USE[max(matches, key=len)] if matches else []


def project_folder(include):
    """The project folder that an include names, or None for a foreign header."""
    if include.startswith(("nibble/v1/", "google/rpc/", "inference/")):
        return "proto"
    top = include.split("/")[0]
    return include.rsplit("/", 1)[0] if "/" in include and top in LAYERS else None


def check_include(path, include):
    problems = []
    folder = project_folder(include)
    if folder is not None and not any(under(folder, a) for a in allowed(path)):
        problems.append(f'{path} includes "{include}": may use only {", ".join(allowed(path))}')
    for kind, (pattern, owners, excluded) in FOREIGN.items():
        if pattern.match(include) and project_folder(include) in (None, "proto"):
            if not any(under(path, o) for o in owners) or any(under(path, e) for e in excluded):
                problems.append(f'{path} includes "{include}": {kind} belongs to {", ".join(owners)}')
    return problems


def parse_cmake(text):
    """(target, linked names) of every call that makes or links a target."""
    text = re.sub(r"#[^\n]*", "", text)
    for command, body in CALL.findall(text):
        words = re.findall(r'"[^"]*"|\S+', body)
        if not words:
            continue
        if command.startswith("nibble_"):
            name, section, libs = None, None, []
            for word in words:
                if word in KEYWORDS:
                    section = word
                elif section == "NAME":
                    name, section = word, None
                elif section == "LIBS":
                    libs.append(word)
            if "GRPC" in words:
                libs.append("nibble_grpc")
            yield name, libs
        else:
            links = words[1:] if command == "target_link_libraries" else []
            yield words[0], [w for w in links if w not in KEYWORDS]


def check_links(cmake_files):
    """cmake_files: {folder: text}. Every link from a project target to another must point the allowed way."""
    folder_of, links = {}, []
    for folder, text in cmake_files.items():
        for target, libs in parse_cmake(text):
            if target and "$" not in target:
                folder_of.setdefault(target, folder)
                links.append((folder, target, libs))
    problems = []
    for folder, target, libs in links:
        for lib in libs:
            used = folder_of.get(lib)
            if used is None:
                continue
            if not any(under(used, a) for a in allowed(folder)):
                problems.append(f"{folder}: {target} links {lib} of {used}: may use only {', '.join(allowed(folder))}")
            elif lib == "nibble_grpc" and not any(under(folder, o) for o in FOREIGN["gRPC"][1] + ["proto"]):
                problems.append(f"{folder}: {target} links {lib}: gRPC belongs to {', '.join(FOREIGN['gRPC'][1])}")
    return problems


class DependencyDirectionTest(unittest.TestCase):
    def test_includes_of_the_repository(self):
        problems, files = [], 0
        for layer in LAYERS:
            for path in sorted((ROOT / layer).rglob("*")):
                if path.suffix in SUFFIXES:
                    files += 1
                    for include in INCLUDE.findall(path.read_text(encoding="utf-8", errors="replace")):
                        problems += check_include(str(path.relative_to(ROOT)), include)
        self.assertGreater(files, 50, f"found only {files} source files under {ROOT}")
        self.assertFalse(problems, "\n" + "\n".join(problems))

    def test_links_of_the_repository(self):
        cmake_files = {}
        for layer in LAYERS:
            for path in (ROOT / layer).rglob("CMakeLists.txt"):
                cmake_files[str(path.parent.relative_to(ROOT))] = path.read_text(encoding="utf-8")
        self.assertGreater(len(list(parse_cmake(cmake_files["common/base"]))), 0)
        problems = check_links(cmake_files)
        self.assertFalse(problems, "\n" + "\n".join(problems))

    def test_wrong_includes_are_found(self):
        wrong = [
            ("common/base/check.cc", "common/model/config.h"),
            ("common/text/bpe.cc", "router/scheduler.h"),
            ("common/model/config.cc", "kernels/ops.h"),
            ("kernels/cpu/gemm.cc", "common/model/config.h"),
            ("kernels/ops.h", "nibble/v1/worker.pb.h"),
            ("kernels/ops.cc", "worker/model/engine.h"),
            ("router/scheduler.cc", "kernels/ops.h"),
            ("router/scheduler.cc", "worker/service.h"),
            ("worker/service.cc", "router/scheduler.h"),
            ("worker/service.cc", "tools/cli/chat.h"),
            ("router/service.cc", "tests/router/fake.h"),
            ("common/base/log.cc", "grpcpp/grpcpp.h"),
            ("common/model/config.cc", "nibble/v1/worker.grpc.pb.h"),
            ("worker/model/runner.cc", "grpcpp/grpcpp.h"),
            ("router/service.cc", "cuda_runtime.h"),
            ("worker/model/weights.cc", "cuda.h"),
            ("worker/comm/gloo_communicator.cc", "nccl.h"),
        ]
        for path, include in wrong:
            self.assertEqual(len(check_include(path, include)), 1, f"{path} -> {include}")

    def test_right_includes_pass(self):
        right = [
            ("common/base/check.cc", "common/base/check.h"),
            ("common/rpc/status.cc", "grpcpp/support/status.h"),
            ("common/rpc/status.cc", "google/rpc/status.pb.h"),
            ("kernels/cpu/gemm.cc", "common/base/float16.h"),
            ("kernels/cuda/gemm.cu", "cuda_runtime.h"),
            ("worker/comm/nccl_communicator.cc", "nccl.h"),
            ("worker/model/runner.cc", "nibble/v1/worker.pb.h"),
            ("worker/service.cc", "nibble/v1/worker.grpc.pb.h"),
            ("router/scheduler.cc", "vector"),
            ("tools/eval/main.cc", "worker/model/engine.h"),
            ("tests/router/scheduler_test.cc", "router/scheduler.h"),
        ]
        for path, include in right:
            self.assertEqual(check_include(path, include), [], f"{path} -> {include}")

    def test_wrong_links_are_found(self):
        tree = {
            "proto": "add_library(nibble_grpc STATIC x.cc)",
            "common/base": "nibble_library(NAME nibble_base SRCS a.cc LIBS nibble_model absl::status)",
            "common/model": "nibble_library(NAME nibble_model GRPC SRCS a.cc LIBS nibble_base)",
            "kernels": "nibble_library(NAME nibble_kernels SRCS a.cc)\ntarget_link_libraries(nibble_kernels PRIVATE nibble_model)",
            "router": "nibble_library(NAME nibble_router\n  SRCS a.cc  # comment nibble_base\n  LIBS nibble_base nibble_kernels)",
            "worker": "nibble_library(NAME nibble_worker SRCS a.cc LIBS nibble_kernels nibble_model nibble_grpc)",
        }
        problems = check_links(tree)
        self.assertEqual(len(problems), 4, problems)
        for folder, lib in [("common/base", "nibble_model"), ("common/model", "nibble_grpc"), ("kernels", "nibble_model"), ("router", "nibble_kernels")]:
            self.assertTrue(any(p.startswith(folder + ":") and lib in p for p in problems), (folder, lib, problems))


if __name__ == "__main__":
    sys.exit(unittest.main())
