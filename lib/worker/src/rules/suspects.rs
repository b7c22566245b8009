//! Crash suspects go with few others, at last alone. A message that was
//! delivered before, and of which nobody knows how that ended, may have killed
//! its worker; everything else that the worker held then is suspected with it.
//! These rules narrow a killer down without taking its company along.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};

use crate::services::QueueFacts;

/// With how many others a message may be held and worked on. In order of
/// suspicion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Company {
    Any,
    Few,
    Nobody,
}

/// What a delivery is suspected of: of nothing the first time, and then the
/// less company the more deliveries ended in a way that nobody knows of. A
/// queue that delivers three times or fewer has none to spare for the middle.
/// What another kind of worker may have done with it counts for nothing here.
pub fn company(unexplained: u32, facts: QueueFacts) -> Company {
    let spares_one = |most: u32| most.saturating_sub(facts.elsewhere) > 3;
    match unexplained.saturating_sub(facts.elsewhere) {
        0 => Company::Any,
        1 if facts.max_receives.is_none_or(spares_one) => Company::Few,
        _ => Company::Nobody,
    }
}

/// Messages in a row that are under less suspicion than the task is prepared
/// for, after which it is prepared for less. Alone, they come one by one.
const CALM_AFTER_ALONE: usize = 4;

/// The messages in hand: which of them may be worked on at the same time, and
/// how many more may come.
pub struct Hand {
    few: usize,
    /// The most suspicious first: it has the fewest deliveries left.
    waiting: BTreeSet<(Reverse<Company>, Reverse<u32>, u64)>,
    working: HashMap<u64, Company>,
    /// What the next message may be suspected of, as far as is known: a task
    /// begins cautiously, since the one before it may have been killed.
    expected: Company,
    calm: usize,
}

impl Hand {
    /// A hand for which `few` messages are few.
    pub fn new(few: usize) -> Self {
        Self {
            few: few.max(1),
            waiting: BTreeSet::new(),
            working: HashMap::new(),
            expected: Company::Few,
            calm: 0,
        }
    }

    /// A message arrived. `receives` is how often it was delivered.
    pub fn enter(&mut self, number: u64, company: Company, receives: u32) {
        self.waiting
            .insert((Reverse(company), Reverse(receives), number));
        if company >= self.expected {
            self.expected = company;
            self.calm = 0;
            return;
        }
        self.calm += 1;
        let (enough, then) = match self.expected {
            Company::Few => (self.few / 2, Company::Any),
            Company::Any | Company::Nobody => (CALM_AFTER_ALONE, Company::Few),
        };
        if self.calm >= enough {
            self.expected = then;
            self.calm = 0;
        }
    }

    /// The next message to work on, if one may begin now.
    pub fn next(&mut self) -> Option<(u64, Company)> {
        let (Reverse(company), receives, number) = *self.waiting.first()?;
        let most_suspicious = self.working.values().copied().fold(company, Company::max);
        let most = match most_suspicious {
            Company::Any => usize::MAX,
            Company::Few => self.few,
            Company::Nobody => 1,
        };
        if self.working.len() >= most {
            return None;
        }
        self.waiting.remove(&(Reverse(company), receives, number));
        self.working.insert(number, company);
        Some((number, company))
    }

    /// A message is no longer in hand.
    pub fn leave(&mut self, number: u64) {
        if self.working.remove(&number).is_none() {
            self.waiting.retain(|(_, _, waiting)| *waiting != number);
        }
    }

    /// How many messages may be held: a death costs each of them a delivery.
    pub fn limit(&self) -> usize {
        match self.expected {
            Company::Any => usize::MAX,
            Company::Few => self.few,
            Company::Nobody => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_company() -> impl Strategy<Value = Company> {
        prop_oneof![
            6 => Just(Company::Any),
            2 => Just(Company::Few),
            1 => Just(Company::Nobody),
        ]
    }

    #[test]
    fn suspicion_grows_with_each_delivery_that_ended_unknown() {
        let given = |max_receives, elsewhere| {
            [0, 1, 2, 3, 4].map(|unexplained| {
                let facts = QueueFacts {
                    max_receives,
                    elsewhere,
                };
                company(unexplained, facts)
            })
        };
        let of = |most| given(most, 0);
        use Company::{Any, Few, Nobody};
        assert_eq!(given(Some(7), 2), [Any, Any, Any, Few, Nobody]);
        assert_eq!(given(Some(5), 2), [Any, Any, Any, Nobody, Nobody]);
        assert_eq!(of(Some(5)), [Any, Few, Nobody, Nobody, Nobody]);
        assert_eq!(of(None), [Any, Few, Nobody, Nobody, Nobody]);
        assert_eq!(of(Some(3)), [Any, Nobody, Nobody, Nobody, Nobody]);
    }

    #[test]
    fn a_task_begins_with_few_and_takes_more_when_nothing_is_suspicious() {
        let mut hand = Hand::new(16);
        assert_eq!(hand.limit(), 16);
        (0..8).for_each(|number| hand.enter(number, Company::Any, 1));
        assert_eq!(hand.limit(), usize::MAX);
        hand.enter(8, Company::Nobody, 3);
        assert_eq!(hand.limit(), 1);
        (9..13).for_each(|number| hand.enter(number, Company::Any, 1));
        assert_eq!(hand.limit(), 16);
    }

    #[test]
    fn the_most_suspicious_goes_first_and_what_has_begun_is_waited_for() {
        let mut hand = Hand::new(4);
        hand.enter(1, Company::Any, 1);
        assert_eq!(hand.next(), Some((1, Company::Any)));
        hand.enter(2, Company::Any, 1);
        hand.enter(3, Company::Nobody, 3);
        hand.enter(4, Company::Nobody, 4);
        assert_eq!(hand.next(), None);
        hand.leave(1);
        assert_eq!(hand.next(), Some((4, Company::Nobody)));
        assert_eq!(hand.next(), None);
        hand.leave(4);
        assert_eq!(hand.next(), Some((3, Company::Nobody)));
        hand.leave(3);
        assert_eq!(hand.next(), Some((2, Company::Any)));
    }

    proptest! {
        #[test]
        fn nobody_works_in_more_company_than_it_may_and_everybody_has_a_turn(
            arrivals in proptest::collection::vec((any_company(), 1u32..6), 1..80),
            few in 1usize..12,
            chance in proptest::collection::vec(any::<prop::sample::Index>(), 200),
        ) {
            let mut hand = Hand::new(few);
            let mut working: Vec<(u64, Company)> = Vec::new();
            let mut begun = 0;
            let mut arriving = arrivals.iter().enumerate();
            let mut chance = chance.into_iter();
            loop {
                let arrived = arriving.next();
                if let Some((number, (company, receives))) = arrived {
                    hand.enter(number as u64, *company, *receives);
                }
                while let Some(next) = hand.next() {
                    begun += 1;
                    working.push(next);
                    let most = working.iter().map(|(_, company)| *company).max();
                    match most {
                        Some(Company::Nobody) => prop_assert_eq!(working.len(), 1),
                        Some(Company::Few) => prop_assert!(working.len() <= few),
                        _ => {}
                    }
                }
                if working.is_empty() {
                    break;
                }
                let index = chance.next().map_or(0, |index| index.index(working.len()));
                let (number, _) = working.swap_remove(index);
                hand.leave(number);
            }
            prop_assert_eq!(begun, arrivals.len());
        }

        #[test]
        fn after_a_suspect_no_more_are_held_than_it_may_be_among(
            before in proptest::collection::vec(any_company(), 0..60),
            few in 1usize..12,
        ) {
            let mut hand = Hand::new(few);
            for (number, company) in before.iter().enumerate() {
                hand.enter(number as u64, *company, 1);
                match company {
                    Company::Nobody => prop_assert_eq!(hand.limit(), 1),
                    Company::Few => prop_assert!(hand.limit() <= few),
                    Company::Any => {}
                }
            }
        }
    }
}
