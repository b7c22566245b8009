//! Packing entries into requests within an API's limits.

use std::ops::Range;

/// What one request of a batch API may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// Entries.
    pub entries: usize,
    /// Bytes of all entries together.
    pub bytes: usize,
}

/// Cuts entries of the given sizes into consecutive requests, each within the
/// limits. An entry that is itself over the limit gets a request of its own;
/// callers keep such entries out.
pub fn pack(sizes: &[usize], limits: BatchLimits) -> Vec<Range<usize>> {
    let mut requests = Vec::new();
    let mut start = 0;
    let mut bytes = 0;
    for (index, size) in sizes.iter().enumerate() {
        let is_full = index - start == limits.entries.max(1);
        if index > start && (is_full || bytes + size > limits.bytes) {
            requests.push(start..index);
            start = index;
            bytes = 0;
        }
        bytes += size;
    }
    if start < sizes.len() {
        requests.push(start..sizes.len());
    }
    requests
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: BatchLimits = BatchLimits {
        entries: 10,
        bytes: 1000,
    };

    #[test]
    fn nothing_makes_no_request() {
        assert!(pack(&[], LIMITS).is_empty());
    }

    proptest! {
        #[test]
        fn every_request_is_within_the_limits_and_nothing_is_left_out(
            sizes in proptest::collection::vec(0usize..=1000, 0..60)
        ) {
            let requests = pack(&sizes, LIMITS);
            let mut next = 0;
            for request in requests {
                prop_assert_eq!(request.start, next);
                prop_assert!(!request.is_empty() && request.len() <= LIMITS.entries);
                prop_assert!(sizes[request.clone()].iter().sum::<usize>() <= LIMITS.bytes);
                next = request.end;
            }
            prop_assert_eq!(next, sizes.len());
        }

        #[test]
        fn no_two_neighbours_would_fit_into_one_request(
            sizes in proptest::collection::vec(0usize..=1000, 0..60)
        ) {
            let requests = pack(&sizes, LIMITS);
            for pair in requests.windows(2) {
                let both = pair[0].start..pair[1].start + 1;
                let fits = both.len() <= LIMITS.entries
                    && sizes[both].iter().sum::<usize>() <= LIMITS.bytes;
                prop_assert!(!fits);
            }
        }
    }
}
