//! The outside world behind the traits of `services`.

pub mod bundle_cache;
pub mod cache_bucket;
pub mod decoders;
pub mod documents;
pub mod engine;
pub mod sqs;
