//! API calls that fail on purpose.

use std::{sync::Mutex, time::Duration};

#[derive(Debug, Clone, PartialEq)]
pub enum ApiFaultKind {
    /// `ThrottlingException` (ECS) or `Throttling` (Auto Scaling), "Rate exceeded".
    Throttle,
    /// HTTP 500, `ServerException` (ECS) or `InternalFailure` (Auto Scaling).
    ServerError,
    /// The call is carried out, and its answer then lost: HTTP 500 instead.
    /// This is what client tokens are for.
    AnswerLost,
    /// The answer takes this much longer.
    Slow(Duration),
    /// A client error with this code and message, such as `AccessDeniedException`.
    Refused { code: String, message: String },
}

#[derive(Debug, Clone)]
pub struct ApiFault {
    /// The operation that fails, such as `RunTask`; none for every operation.
    pub operation: Option<String>,
    pub kind: ApiFaultKind,
    /// Share of the calls that fail, 0 to 1.
    pub rate: f64,
    /// How many calls fail in all; none for no end.
    pub times: Option<u32>,
}

impl ApiFault {
    /// Every call of `operation` fails this way until the faults are cleared.
    pub fn always(operation: &str, kind: ApiFaultKind) -> Self {
        Self {
            operation: Some(operation.to_owned()),
            ..Self::share(1.0, kind)
        }
    }

    /// The next `times` calls of `operation` fail this way.
    pub fn next(operation: &str, times: u32, kind: ApiFaultKind) -> Self {
        Self {
            times: Some(times),
            ..Self::always(operation, kind)
        }
    }

    /// This share of all calls fails this way.
    pub fn share(rate: f64, kind: ApiFaultKind) -> Self {
        Self {
            operation: None,
            kind,
            rate,
            times: None,
        }
    }
}

#[derive(Default)]
pub(crate) struct Faults {
    active: Mutex<Active>,
}

struct Active {
    faults: Vec<ApiFault>,
    draws: fastrand::Rng,
}

impl Default for Active {
    fn default() -> Self {
        Self {
            faults: Vec::new(),
            // The same in every run, so that a failing test fails again.
            draws: fastrand::Rng::with_seed(0),
        }
    }
}

impl Faults {
    pub fn add(&self, fault: ApiFault) {
        self.lock().faults.push(fault);
    }

    pub fn clear(&self) {
        self.lock().faults.clear();
    }

    /// The fault that hits this call, if one does.
    pub fn strike(&self, operation: &str) -> Option<ApiFaultKind> {
        let mut active = self.lock();
        let draw = active.draws.f64();
        let hit = active.faults.iter_mut().find(|fault| {
            let named = fault
                .operation
                .as_deref()
                .is_none_or(|name| name == operation);
            named && fault.times != Some(0) && draw < fault.rate
        })?;
        if let Some(times) = &mut hit.times {
            *times -= 1;
        }
        Some(hit.kind.clone())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Active> {
        self.active
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_hits_its_operation_its_number_of_times() {
        let faults = Faults::default();
        faults.add(ApiFault::next("RunTask", 2, ApiFaultKind::Throttle));
        assert_eq!(faults.strike("ListTasks"), None);
        assert_eq!(faults.strike("RunTask"), Some(ApiFaultKind::Throttle));
        assert_eq!(faults.strike("RunTask"), Some(ApiFaultKind::Throttle));
        assert_eq!(faults.strike("RunTask"), None);
    }

    #[test]
    fn a_share_of_calls_is_hit() {
        let faults = Faults::default();
        faults.add(ApiFault::share(0.3, ApiFaultKind::ServerError));
        let hits = (0..1000)
            .filter(|_| faults.strike("RunTask").is_some())
            .count();
        assert!((250..350).contains(&hits), "{hits}");
    }
}
