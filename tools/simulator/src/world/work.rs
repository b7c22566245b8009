//! The queue, and what tasks do with its messages.

use std::collections::VecDeque;

use planner::observation::TaskStatus;

use super::{Event, Ms, Physics, Signal, Worker, World};

/// What a poll brings at most, as seconds of one task's work: the grain of the
/// simulation. A task polls on while it has room, so nothing waits for a grain;
/// the room that one takes is free again when its last image is done.
const GRAIN_SECONDS: f64 = 1.0;

/// Minutes of CloudWatch's sums that are kept.
pub(super) const METRIC_MINUTES: usize = 16;

/// ECS's words for a task that ended by itself.
const EXITED: &str = "EssentialContainerExited";

/// Images: when they arrived in the queue, and how many.
pub(super) type Pieces = Vec<(Ms, u64)>;

/// Images that a task received together. They go through its model one after
/// the other, behind those that it received before.
#[derive(Clone, Debug)]
struct Grain {
    number: u64,
    pieces: Pieces,
    images: u64,
    /// When the model begins with the first of them.
    begins: f64,
}

impl Grain {
    /// How many of its images are deleted from the queue by `now`.
    fn done_by(&self, now: Ms, physics: &Physics) -> u64 {
        let at_model = now as f64 - physics.deliver as f64 - self.begins;
        let done = (at_model / physics.per_image()).max(0.0) as u64;
        done.min(self.images)
    }
}

/// The first `count` images of the pieces, and the rest.
fn split(pieces: Pieces, mut count: u64) -> (Pieces, Pieces) {
    let (mut first, mut rest) = (Vec::new(), Vec::new());
    for (at, images) in pieces {
        let taken = images.min(count);
        count -= taken;
        first.push((at, taken));
        rest.push((at, images - taken));
    }
    first.retain(|(_, images)| *images > 0);
    rest.retain(|(_, images)| *images > 0);
    (first, rest)
}

/// What a task holds.
#[derive(Clone, Debug, Default)]
pub(super) struct Workload {
    /// In the order in which the model takes them.
    grains: VecDeque<Grain>,
    /// Images in them.
    pub(super) held: u64,
    /// When the model is through with them.
    model_free: f64,
    pub(super) idle_since: Ms,
}

impl Worker {
    /// Whether it receives, or would if it had room.
    pub(super) fn receives(&self) -> bool {
        self.is_ready && !self.shown.stopping && self.shown.status == TaskStatus::Running
    }

    pub(super) fn has_work(&self) -> bool {
        !self.work.grains.is_empty()
    }
}

impl World {
    pub(super) fn arrive(&mut self, index: usize) {
        let (at, count) = self.arrivals[index];
        self.queue.push_back((at, count));
        self.visible += count;
        self.arrived = index + 1;
        self.tally.arrived += count;
        self.tally.first_arrival.get_or_insert(at);
        let minute = at.div_euclid(60_000);
        match self.sent.back_mut() {
            Some((known, sum)) if *known == minute => *sum += count,
            _ => self.sent.push_back((minute, count)),
        }
        while self.sent.len() > METRIC_MINUTES {
            self.sent.pop_front();
        }
        if let Some((next, _)) = self.arrivals.get(index + 1) {
            self.schedule(*next, Event::Arrive(index + 1));
        }
        self.signals.push(Signal::Arrived);
        self.dispatch();
        self.note();
    }

    pub(super) fn reappear(&mut self, pieces: Pieces) {
        for (at, count) in pieces.into_iter().rev() {
            self.queue.push_front((at, count));
            self.visible += count;
            self.in_flight -= count;
        }
        self.dispatch();
        self.note();
    }

    pub(super) fn take(&mut self, mut wanted: u64) -> Pieces {
        let mut pieces = Vec::new();
        while wanted > 0 {
            let Some((at, count)) = self.queue.front_mut() else {
                break;
            };
            let taken = (*count).min(wanted);
            pieces.push((*at, taken));
            *count -= taken;
            wanted -= taken;
            self.visible -= taken;
            self.in_flight += taken;
            if *count == 0 {
                self.queue.pop_front();
            }
        }
        pieces
    }

    /// Gives visible messages to the tasks that have room, in turn: every task
    /// polls while it works, and SQS favours nobody.
    pub(super) fn dispatch(&mut self) {
        self.invoke();
        let grain = (self.physics.images_per_second * GRAIN_SECONDS).max(1.0) as u64;
        let held_most = self.physics.held_most();
        let workers = &self.workers;
        self.receivers.retain(|worker| workers[*worker].receives());
        while self.visible > 0 {
            let with_room = |worker: &&usize| self.workers[**worker].work.held < held_most;
            let sharers = self.receivers.iter().filter(with_room).count() as u64;
            if sharers == 0 {
                return;
            }
            let share = self.visible.div_ceil(sharers).min(grain);
            for _ in 0..self.receivers.len() {
                if self.visible == 0 {
                    return;
                }
                let worker = self.receivers[0];
                self.receivers.rotate_left(1);
                let room = held_most.saturating_sub(self.workers[worker].work.held);
                if room > 0 {
                    self.receive(worker, share.min(room));
                }
            }
        }
    }

    fn receive(&mut self, worker: usize, count: u64) {
        let pieces = self.take(count);
        let images: u64 = pieces.iter().map(|(_, count)| count).sum();
        self.grains += 1;
        let number = self.grains;
        let fetched = (self.now + self.physics.fetch) as f64;
        let work = &mut self.workers[worker].work;
        let begins = fetched.max(work.model_free);
        work.model_free = begins + images as f64 * self.physics.per_image();
        work.held += images;
        work.grains.push_back(Grain {
            number,
            pieces,
            images,
            begins,
        });
        let at = work.model_free.ceil() as Ms + self.physics.deliver;
        self.schedule(at, Event::GrainDone(worker, number));
    }

    pub(super) fn grain_done(&mut self, worker: usize, number: u64) {
        let work = &mut self.workers[worker].work;
        // A task that was stopped or lost has given it away.
        let Some(grain) = work.grains.pop_front_if(|grain| grain.number == number) else {
            return;
        };
        work.held -= grain.images;
        let is_idle = work.grains.is_empty();
        self.count_done(grain.begins, grain.pieces);
        if is_idle {
            self.wait_for_work(worker);
        } else {
            self.dispatch();
        }
        self.note();
    }

    /// Counts images of a grain, its first ones, as done.
    fn count_done(&mut self, model_begins: f64, pieces: Pieces) {
        let per_image = self.physics.per_image();
        let began = model_begins + self.physics.deliver as f64;
        let mut done_before = 0;
        for (arrived, count) in pieces {
            self.tally
                .images_done(arrived, count, began, done_before, per_image);
            done_before += count;
        }
        if done_before > 0 {
            self.in_flight -= done_before;
            self.tally.busy += (done_before as f64 * per_image) as Ms;
            self.tally.last_done = self.now;
        }
    }

    /// The task ends now: what it has done is done, the rest is answered.
    pub(super) fn drop_work(&mut self, worker: usize) -> Pieces {
        let work = &mut self.workers[worker].work;
        let grains = std::mem::take(&mut work.grains);
        work.held = 0;
        let mut rest = Vec::new();
        for grain in grains {
            let done = grain.done_by(self.now, &self.physics);
            let (finished, unfinished) = split(grain.pieces, done);
            self.count_done(grain.begins, finished);
            rest.extend(unfinished);
        }
        rest
    }

    pub(super) fn wait_for_work(&mut self, worker: usize) {
        if self.workers[worker].shown.stopping {
            self.end_task(worker, Some(0), Some(EXITED), "drained");
            return;
        }
        self.workers[worker].work.idle_since = self.now;
        self.dispatch();
        if let Some(after) = self.idle_exit
            && !self.workers[worker].has_work()
        {
            self.schedule_in(after, Event::IdleCheck(worker, self.now));
        }
    }

    pub(super) fn idle_check(&mut self, worker: usize, since: Ms) {
        let state = &self.workers[worker];
        let has_waited = state.work.idle_since == since && !state.has_work();
        if has_waited && state.shown.status == TaskStatus::Running && !state.shown.stopping {
            let reason = "Essential container in task exited";
            self.end_task(worker, Some(0), Some(EXITED), reason);
        }
    }

    pub(super) fn fail_at_start(&mut self, worker: usize) {
        let reason = "Essential container in task exited: the model bundle is damaged";
        self.end_task(worker, Some(1), Some(EXITED), reason);
    }

    /// StopTask: what the model has begun with is finished, what waits for it
    /// is handed back at once; a task without work ends at once.
    pub(super) fn stop_task(&mut self, worker: usize, reason: &str) {
        let now = self.now as f64;
        let state = &mut self.workers[worker];
        let work = &mut state.work;
        let begun = work.grains.partition_point(|grain| grain.begins <= now);
        let waiting = work.grains.split_off(begun);
        work.held -= waiting.iter().map(|grain| grain.images).sum::<u64>();
        let handed_back: Pieces = waiting.into_iter().flat_map(|grain| grain.pieces).collect();
        if begun == 0 {
            let exit_code = state.is_ready.then_some(0);
            self.end_task(worker, exit_code, Some("UserInitiated"), reason);
        } else {
            state.shown.stopping = true;
        }
        if !handed_back.is_empty() {
            self.reappear(handed_back);
        }
    }
}
