//! Every failure is permanent or transient, and its type says which.

/// Whether trying again can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The input itself is at fault (bad image, gone object, refused request):
    /// the same call will fail again.
    Permanent,
    /// Throttling, network, access or capacity: a later try can succeed.
    Transient,
}

impl Failure {
    /// The word in logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Failure::Permanent => "permanent",
            Failure::Transient => "transient",
        }
    }
}
