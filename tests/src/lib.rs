//! Whole-pipeline tests: S3 in, CloudEvents out, against the emulated AWS.
