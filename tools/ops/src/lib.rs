//! The operator's commands.
//!
//! - [`backfill`] puts what lies in a bucket already onto the input queue, as
//!   the S3 trigger would have when the objects came;
//! - [`redrive`] shows the dead-letter queue with its reasons and sends chosen
//!   messages back.
//!
//! Both know the queues, the buckets and the event; neither knows images.

pub mod backfill;
pub mod cli;
pub mod redrive;
pub mod stop;
pub mod units;
