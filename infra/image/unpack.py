"""Takes the shared libraries that the image needs out of downloaded wheels.

Usage: python unpack.py cpu|cuda WHEELS OUTPUT. A library that is not there is an
error; everything else in the wheels (Python, headers, the rest of cuDNN) is left out.
Those of the CUDA image are the ones that its rehearsal sees opened, no more, no less.
"""

import pathlib
import re
import shutil
import sys
import zipfile

ONNX_RUNTIME = [
    # Dropping the version gives one name for ORT_DYLIB_PATH.
    (r"onnxruntime/capi/libonnxruntime\.so\.[0-9.]+", "libonnxruntime.so"),
    (r"onnxruntime/capi/libonnxruntime_providers_shared\.so", None),
]
CUDA = [
    (r"onnxruntime/capi/libonnxruntime_providers_cuda\.so", None),
    (r"nvidia/cu13/lib/libcublas\.so\.13", None),
    (r"nvidia/cu13/lib/libcublasLt\.so\.13", None),
    (r"nvidia/cu13/lib/libcudart\.so\.13", None),
    (r"nvidia/cu13/lib/libcurand\.so\.10", None),
    # Linked by nothing: attention asks for a cuDNN handle, and cudnnCreate opens these.
    (r"nvidia/cudnn/lib/libcudnn\.so\.9", None),
    (r"nvidia/cudnn/lib/libcudnn_graph\.so\.9", None),
]
# libcudnn_graph links zlib, which the base image lacks; Debian's, as the base.
SYSTEM = [pathlib.Path("/lib/x86_64-linux-gnu/libz.so.1")]


def main(variant, wheels, output):
    wanted = ONNX_RUNTIME + (CUDA if variant == "cuda" else [])
    output.mkdir(parents=True, exist_ok=True)
    missing = {pattern for pattern, _ in wanted}
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.namelist():
                for pattern, name in wanted:
                    if re.fullmatch(pattern, entry):
                        target = output / (name or pathlib.PurePosixPath(entry).name)
                        with archive.open(entry) as source, target.open("wb") as sink:
                            while block := source.read(1 << 20):
                                sink.write(block)
                        target.chmod(0o755)
                        missing.discard(pattern)
    if missing:
        sys.exit(f"not in any wheel: {sorted(missing)}")
    for library in SYSTEM if variant == "cuda" else []:
        shutil.copy(library, output)


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]))
