//! The express lane as a second kind of capacity: it begins at once, costs
//! nothing while idle, has a ceiling, and an image there is dearer than on a
//! GPU that runs anyway. Which of the two does a backlog is a question of
//! seconds and dollars; both are estimated here for each way to do it.

use serde::{Deserialize, Serialize};

use crate::observation::{Lane, LaneState, Observation};
use crate::policy::{LanePolicy, Policy};

/// Work waits this long and the lane finishes nothing: it has stalled. A cold
/// start and an invocation take less.
const STALLED_SECONDS: u64 = 60;

/// However much the lane finishes, it does not cope when something waits longer
/// than this beyond the promise.
const LATE_SECONDS: u64 = 180;

/// What the lane reports is believed within this factor of the configured time.
const LANE_TRUST: f64 = 5.0;

/// What begins sooner is chosen while it is dearer by no more than this share:
/// the lane alone, and the lane until instances work.
const NEARLY: f64 = 1.03;

/// A mapping takes up to a minute to close (no figure is documented for SQS):
/// until then the lane goes on.
const CLOSING_SECONDS: f64 = 60.0;

/// A sustained rate is expected to go on as long as it has been seen to last:
/// the three minutes of [`crate::observation::SUSTAINED_MINUTES`].
const SUSTAINED_SECONDS: f64 = 180.0;

/// The lane is closed when GPUs that work have more than this many seconds of
/// work left. A mapping takes up to a minute to change.
pub(crate) const CLOSE_ABOVE_SECONDS: f64 = 90.0;

/// The lane is opened again when they have less than this left. They are idle
/// for half a minute before they go, so that one of both is always there.
pub(crate) const OPEN_BELOW_SECONDS: f64 = 30.0;

/// ... and what comes all the time would cost less than this share of them there.
const STREAM_AGAIN: f64 = 0.7;

/// Who does the backlog.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Choice {
    /// The lane; no instance is started for it.
    Lane,
    /// The lane until instances work.
    Both,
    /// GPUs alone.
    #[default]
    Gpus,
}

/// What one way to do the backlog takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Instances that it starts.
    pub starts: u32,
    /// Until all is done.
    pub seconds: f64,
    /// What that costs from now on; 0 without prices.
    pub dollars: f64,
}

/// The comparison behind a choice.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Comparison {
    /// What was chosen.
    pub choice: Choice,
    /// Why.
    pub why: String,
    /// Billed seconds of one image in the lane.
    pub seconds_per_image: f64,
    /// Images per second at the lane's ceiling.
    pub ceiling: f64,
    /// Dollars of an image in the lane.
    pub dollars_per_image: f64,
    /// The lane alone.
    pub lane: Estimate,
    /// The lane until instances work.
    pub both: Estimate,
    /// GPUs alone.
    pub gpus: Estimate,
}

/// What GPUs would do and cost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gpus {
    /// Running, starting, booting or asked for.
    pub(crate) existing: u32,
    /// Of these, tasks that run.
    pub(crate) running: u32,
    /// Images per second of one.
    pub(crate) rate: f64,
    /// Dollars of one for an hour, where the price is known.
    pub(crate) usd_per_hour: Option<f64>,
    /// Seconds until one that is asked for now begins.
    pub(crate) boot: f64,
    /// Work left then if the lane does nothing.
    pub(crate) rest: f64,
    /// Of it, what only GPUs can do.
    pub(crate) only_gpu: f64,
}

/// The lane in this run.
pub(crate) struct Express<'a> {
    policy: &'a LanePolicy,
    pub(crate) seen: &'a Lane,
    /// Images per second at its ceiling.
    pub(crate) ceiling: f64,
    seconds_per_image: f64,
    pub(crate) dollars_per_image: f64,
    /// Why GPUs must do its work, if they must.
    pub(crate) stalled: Option<String>,
}

impl<'a> Express<'a> {
    pub(crate) fn of(seen: &'a Observation, policy: &'a Policy) -> Option<Self> {
        let (lane, rules) = (seen.lane.as_ref()?, policy.lane.as_ref()?);
        let configured = rules.seconds_per_image.max(0.001);
        let measured = lane.seconds_per_image.filter(|seconds| *seconds > 0.0);
        let seconds_per_image = measured.map_or(configured, |seconds| {
            seconds.clamp(configured / LANE_TRUST, configured * LANE_TRUST)
        });
        let gb = f64::from(rules.memory_mb) / 1024.0;
        Some(Self {
            policy: rules,
            seen: lane,
            ceiling: f64::from(rules.max_concurrency) / seconds_per_image,
            seconds_per_image,
            dollars_per_image: seconds_per_image * gb * rules.usd_per_gb_second
                + rules.usd_per_request / f64::from(rules.batch_size.max(1)),
            stalled: why_stalled(seen, lane, policy),
        })
    }

    /// What the lane has cost today, as far as it is known.
    pub(crate) fn spent(&self) -> f64 {
        let gb = f64::from(self.policy.memory_mb) / 1024.0;
        self.seen.seconds_today * gb * self.policy.usd_per_gb_second
            + self.seen.requests_today * self.policy.usd_per_request
    }

    /// Compares the three ways for `backlog` images of the input queue to which
    /// `arrivals` a second are added. Answers also the work that is left for
    /// instances asked for now.
    pub(crate) fn compare(
        &self,
        backlog: f64,
        arrivals: f64,
        gpus: &Gpus,
        policy: &Policy,
        starts: impl Fn(f64) -> u32,
    ) -> (Comparison, f64) {
        let drain = f64::from(policy.target_drain_seconds);
        let idle = policy.idle_grace_seconds.max(policy.idle_exit_seconds);
        let second = gpus.usd_per_hour.unwrap_or(0.0) / 3600.0;
        let wake = second * (gpus.boot + f64::from(idle));
        let on_gpu = second / gpus.rate;
        let in_lane = self.dollars_per_image;
        let work = backlog + arrivals * SUSTAINED_SECONDS;
        let rest = self.rest_beside(gpus);
        let more = |rest: f64| starts(rest).saturating_sub(gpus.existing);
        // What the lane does before instances that are asked for now work.
        let meanwhile = work.min(self.ceiling * gpus.boot);
        let of_gpus = |rest: f64, lane_part: f64| {
            let starts = more(rest);
            let all = f64::from((starts + gpus.existing).max(1)) * gpus.rate;
            Estimate {
                starts,
                seconds: if rest > 0.0 {
                    gpus.boot + rest / all
                } else {
                    backlog / self.ceiling
                },
                dollars: f64::from(starts) * wake
                    + on_gpu * (work - lane_part)
                    + in_lane * lane_part,
            }
        };
        let lane = Estimate {
            starts: more(gpus.only_gpu),
            seconds: backlog / self.ceiling,
            dollars: in_lane * work,
        };
        let until_closed = match self.seen.state.is_open() {
            true => work.min(self.ceiling * CLOSING_SECONDS.min(gpus.boot)),
            false => 0.0,
        };
        let rest_alone = (gpus.rest - until_closed).max(gpus.only_gpu);
        let both = of_gpus(rest, meanwhile);
        let alone = of_gpus(rest_alone, until_closed);
        let is_late = rest > gpus.only_gpu && rest > self.ceiling * drain;
        let has_price = gpus.usd_per_hour.is_some();
        let is_cheapest = !has_price || lane.dollars <= NEARLY * both.dollars.min(alone.dollars);
        // It keeps up, and still GPUs would do all that comes for less.
        let is_stream = !is_cheapest && backlog < arrivals * SUSTAINED_SECONDS && !is_late;
        let sunk = f64::from(gpus.existing) * wake;
        let is_both_cheap = sunk + both.dollars <= NEARLY * (sunk + alone.dollars);
        let (choice, why) = match &self.stalled {
            Some(why) => (Choice::Gpus, format!("the lane has stalled: {why}")),
            None if !self.seen.state.is_open() && gpus.existing > 0 => (
                Choice::Gpus,
                "the lane is closed while GPUs are there".to_owned(),
            ),
            None if is_cheapest && !is_late => (Choice::Lane, "in time and cheapest".to_owned()),
            None if is_stream => {
                let why = "the lane keeps up, GPUs do what keeps coming for less";
                (Choice::Both, why.to_owned())
            }
            None if !has_price || is_both_cheap => {
                let why = match is_late {
                    true => format!("the lane alone is late by more than {drain:.0} s"),
                    false => "the lane alone is dearer".to_owned(),
                };
                (Choice::Both, why)
            }
            None => {
                let why = "cheapest: the lane would take much of it while they boot";
                (Choice::Gpus, why.to_owned())
            }
        };
        let rest = match choice {
            Choice::Lane => gpus.only_gpu,
            Choice::Both if !is_stream => rest,
            Choice::Gpus if self.stalled.is_none() => rest_alone,
            _ => gpus.rest,
        };
        let comparison = Comparison {
            choice,
            why,
            seconds_per_image: self.seconds_per_image,
            ceiling: self.ceiling,
            dollars_per_image: in_lane,
            lane,
            both,
            gpus: alone,
        };
        (comparison, rest)
    }

    /// Work left when an instance that is asked for now begins, the lane beside.
    pub(crate) fn rest_beside(&self, gpus: &Gpus) -> f64 {
        (gpus.rest - self.ceiling * gpus.boot).max(gpus.only_gpu)
    }

    /// Whether instances that are there anyway get tasks for the lane's work.
    pub(crate) fn is_worth_a_task(&self, backlog: f64, gpus: &Gpus) -> bool {
        backlog > f64::from(gpus.existing) * gpus.rate * OPEN_BELOW_SECONDS && gpus.existing > 0
    }

    /// Whether the lane should be open, when GPUs are there or come.
    pub(crate) fn should_be_open(
        &self,
        choice: Choice,
        backlog: f64,
        arrivals: f64,
        gpus: &Gpus,
    ) -> bool {
        let second = gpus.usd_per_hour.unwrap_or(0.0) / 3600.0;
        let on_gpu = second / gpus.rate;
        // What comes all the time in the lane, as a share of the instances' price.
        let stream = arrivals * self.dollars_per_image / (second * f64::from(gpus.existing.max(1)));
        if gpus.existing == 0 || self.stalled.is_some() || on_gpu >= self.dollars_per_image {
            return true;
        }
        let working = f64::from(gpus.running) * gpus.rate;
        match self.seen.state.is_open() {
            true => {
                let is_beyond = backlog > working * CLOSE_ABOVE_SECONDS || stream > 1.0;
                match gpus.running {
                    0 => choice != Choice::Gpus,
                    _ => !is_beyond,
                }
            }
            // Who closed it for them waits until they work.
            false if gpus.running == 0 => false,
            false => backlog <= working * OPEN_BELOW_SECONDS && stream < STREAM_AGAIN,
        }
    }

    /// Whether it does `arrivals` images a second for less than an instance.
    pub(crate) fn is_cheaper_for(&self, arrivals: f64, usd_per_hour: Option<f64>) -> bool {
        let works = self.seen.images_lately.is_some_and(|images| images > 0);
        let price = usd_per_hour.unwrap_or(0.0) / 3600.0;
        works
            && self.seen.state.is_open()
            && self.stalled.is_none()
            && arrivals <= self.ceiling / 2.0
            && arrivals * self.dollars_per_image < price
    }
}

fn why_stalled(seen: &Observation, lane: &Lane, policy: &Policy) -> Option<String> {
    if lane.state == LaneState::Throttled {
        return Some("the reserved concurrency of its function is 0".to_owned());
    }
    let age = seen.queue.oldest_age.filter(|_| seen.queue.backlog() > 0)?;
    if !lane.state.is_open() {
        return None;
    }
    if age >= STALLED_SECONDS && lane.images_lately == Some(0) {
        Some(format!("work waits for {age} s and it finished nothing"))
    } else if age >= u64::from(policy.target_drain_seconds) + LATE_SECONDS {
        Some(format!("work waits for {age} s"))
    } else {
        None
    }
}
