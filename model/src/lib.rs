//! Compiles CLIP weights into the ONNX bundle that the task loads, and runs it.
