//! The express lane: a function that an event source mapping feeds from the
//! same queue.

use planner::observation::{Lane, LaneState};

use super::work::{METRIC_MINUTES, Pieces};
use super::{Event, Ms, World};

/// Concurrent batches that the mapping begins with, and how many more each
/// second (AWS Lambda developer guide, *Scaling for standard queues*: 5, and 300
/// more a minute).
const FIRST_BATCHES: u32 = 5;
const MORE_BATCHES_A_SECOND: Ms = 5;

/// A mapping without work goes back to its first pollers.
const COOLS_AFTER: Ms = 60_000;

/// An environment stays warm at least so long.
const WARM: Ms = 300_000;

/// From a message's arrival to the invocation: a long poll and a call.
const POLL: Ms = 100;

/// Receives of the idle mapping: five pollers, twenty seconds each.
const IDLE_POLLS_PER_SECOND: f64 = 0.25;

/// A mapping changes within this time.
const CHANGE: std::ops::Range<Ms> = 5_000..60_000;

/// How fast the function is.
#[derive(Clone, Debug)]
pub struct LanePhysics {
    pub max_concurrency: u32,
    pub batch_size: u64,
    /// Of the model, for an image.
    pub per_image: f64,
    /// Start of a new environment, billed too.
    pub cold_start: Ms,
}

impl Default for LanePhysics {
    /// ViT-B/32 on one vCPU with AVX2, from a zip: estimates, none measured on
    /// Lambda yet (README).
    fn default() -> Self {
        Self {
            max_concurrency: 8,
            batch_size: 10,
            per_image: 100.0,
            cold_start: 2_000,
        }
    }
}

impl LanePhysics {
    /// Billed seconds of an image of a full batch.
    pub fn seconds_per_image(&self, transfers: Ms) -> f64 {
        self.busy(self.batch_size, transfers) as f64 / 1000.0 / self.batch_size as f64
    }

    /// Billed milliseconds of so many images, transfers included: they go on
    /// side by side.
    fn busy(&self, images: u64, transfers: Ms) -> Ms {
        transfers + (images as f64 * self.per_image).ceil() as Ms
    }
}

/// The lane and what it has cost.
#[derive(Clone, Debug)]
pub(super) struct LaneWorld {
    pub(super) physics: LanePhysics,
    state: LaneState,
    /// Counts changes asked for: only the last one takes place.
    change: u32,
    rng: fastrand::Rng,
    busy: u32,
    /// Idle environments, by the time of their last invocation.
    warm: Vec<Ms>,
    ramp_from: Ms,
    /// The second of the ramp that is waited for.
    ramp_waits: Ms,
    last_used: Ms,
    open_since: Option<Ms>,
    invocations: Vec<Option<Pieces>>,
    /// Images done in each minute.
    done: std::collections::VecDeque<(Ms, u64)>,
    full_batch_at: Option<Ms>,
}

impl World {
    /// Adds a lane, open.
    pub fn set_lane_physics(&mut self, physics: LanePhysics, seed: u64) {
        self.lane = Some(LaneWorld {
            physics,
            state: LaneState::Open,
            change: 0,
            rng: fastrand::Rng::with_seed(seed),
            busy: 0,
            warm: Vec::new(),
            ramp_from: Ms::MIN / 2,
            ramp_waits: -1,
            last_used: Ms::MIN / 2,
            open_since: Some(0),
            invocations: Vec::new(),
            done: Default::default(),
            full_batch_at: None,
        });
    }

    /// UpdateEventSourceMapping.
    pub(super) fn set_lane(&mut self, open: bool) {
        let Some(lane) = &mut self.lane else {
            return;
        };
        lane.change += 1;
        lane.state = if open {
            LaneState::Opening
        } else {
            LaneState::Closing
        };
        let (change, after) = (lane.change, lane.rng.i64(CHANGE));
        self.schedule_in(after, Event::LaneChanged(change));
    }

    pub(super) fn lane_changed(&mut self, change: u32) {
        let now = self.now;
        let Some(lane) = self.lane.as_mut().filter(|lane| lane.change == change) else {
            return;
        };
        if lane.state == LaneState::Opening {
            lane.state = LaneState::Open;
            lane.open_since = Some(now);
        } else {
            lane.state = LaneState::Closed;
        }
        self.tally_polls();
        self.dispatch();
    }

    /// Counts the idle mapping's receives until now.
    pub(super) fn tally_polls(&mut self) {
        let now = self.now;
        if let Some(lane) = &mut self.lane
            && let Some(since) = lane.open_since
        {
            self.tally.lane_polls += (now - since) as f64 / 1000.0 * IDLE_POLLS_PER_SECOND;
            lane.open_since = (lane.state != LaneState::Closed).then_some(now);
        }
    }

    /// Starts invocations while there is work and room.
    pub(super) fn invoke(&mut self) {
        while self.visible > 0 {
            let now = self.now;
            let Some(lane) = &mut self.lane else {
                return;
            };
            if lane.open_since.is_none() {
                return;
            }
            if now - lane.last_used > COOLS_AFTER {
                lane.ramp_from = now;
            }
            let ramp =
                FIRST_BATCHES + ((now - lane.ramp_from) / 1000 * MORE_BATCHES_A_SECOND) as u32;
            if lane.busy >= lane.physics.max_concurrency.min(ramp) {
                if lane.busy < lane.physics.max_concurrency && !lane.waits_for_ramp(now) {
                    let next = 1000 - (now - lane.ramp_from) % 1000;
                    self.schedule_in(next, Event::LaneRamp);
                }
                return;
            }
            lane.last_used = now;
            lane.busy += 1;
            lane.warm.retain(|last| now - last < WARM);
            let cold = match lane.warm.pop() {
                Some(_) => 0,
                None => lane.physics.cold_start,
            };
            let batch = lane.physics.batch_size;
            let number = lane.invocations.len();
            let transfers = self.physics.fetch + self.physics.deliver;
            let pieces = self.take(batch);
            let images = pieces.iter().map(|(_, count)| count).sum();
            let Some(lane) = &mut self.lane else {
                return;
            };
            let billed = cold + lane.physics.busy(images, transfers);
            if images == batch {
                lane.full_batch_at = Some(now);
            }
            lane.invocations.push(Some(pieces));
            self.tally.lane_ms += billed;
            self.tally.lane_requests += 1;
            self.schedule_in(POLL + billed, Event::LaneDone(number));
        }
    }

    pub(super) fn lane_done(&mut self, number: usize) {
        let now = self.now;
        let Some(lane) = &mut self.lane else {
            return;
        };
        let pieces = lane.invocations[number].take().unwrap_or_default();
        lane.busy -= 1;
        lane.warm.push(now);
        lane.last_used = now;
        let minute = now.div_euclid(60_000);
        let images: u64 = pieces.iter().map(|(_, count)| count).sum();
        match lane.done.back_mut() {
            Some((known, sum)) if *known == minute => *sum += images,
            _ => lane.done.push_back((minute, images)),
        }
        while lane.done.len() > METRIC_MINUTES {
            lane.done.pop_front();
        }
        for (arrived, count) in pieces {
            self.tally.images_done(arrived, count, now as f64, 0, 0.0);
        }
        self.in_flight -= images;
        self.tally.lane_images += images;
        self.tally.last_done = now;
        self.dispatch();
        self.note();
    }

    /// As the scaler's reads show it: metrics a minute late.
    pub(super) fn seen_lane(&self) -> Option<Lane> {
        let lane = self.lane.as_ref()?;
        let this_minute = (self.now - super::api::METRIC_DELAY).div_euclid(60_000);
        let lately = |minute: Ms| (this_minute - 3..this_minute).contains(&minute);
        let done = lane.done.iter().filter(|(minute, _)| lately(*minute));
        let transfers = self.physics.fetch + self.physics.deliver;
        let full = lane.physics.seconds_per_image(transfers);
        let is_known = lane
            .full_batch_at
            .is_some_and(|at| (60_000..900_000).contains(&(self.now - at)));
        Some(Lane {
            state: lane.state,
            seconds_per_image: is_known.then_some(full),
            images_lately: Some(done.map(|(_, images)| images).sum()),
            ..Lane::default()
        })
    }
}

impl LaneWorld {
    /// Whether a wake for more concurrency is under way in this second.
    fn waits_for_ramp(&mut self, now: Ms) -> bool {
        let second = (now - self.ramp_from) / 1000;
        std::mem::replace(&mut self.ramp_waits, second) == second
    }
}
