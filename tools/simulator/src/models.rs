//! What users would have instead. Each model is simplified in its favour
//! where the sources leave room; `README.md` beside this crate lists the
//! sources.

use std::collections::VecDeque;

use crate::world::{Controller, Ms, Signal, World};

/// Terminates up to `count` instances that hold no work.
fn give_back_idle(world: &mut World, count: u32, may_hold_waiting_task: bool) {
    let mut idle = world.living();
    idle.retain(|instance| match may_hold_waiting_task {
        true => !world.works(*instance),
        false => !world.holds_task(*instance),
    });
    for instance in idle.into_iter().take(count as usize) {
        world.terminate(instance, true);
    }
}

/// (a) The original: a Lambda each minute calls RunTask with a capacity
/// provider, ECS managed scaling changes the Auto Scaling group.
pub struct Original {
    max: u32,
    phase: Ms,
    /// Tasks that wait in PROVISIONING for an instance.
    provisioning: u32,
    low_minutes: u32,
    alarm_metric: Option<f64>,
}

impl Original {
    const AUTOSCALER: u32 = 1;
    const MANAGED_SCALING: u32 = 2;
    const ALARM: u32 = 3;
    const PLACE: u32 = 4;

    const MINUTE: Ms = 60_000;
    /// A datapoint of the reservation metric becomes an alarm: half of its minute.
    const ALARM_DELAY: Ms = 30_000;
    /// Scale-in alarm: 15 datapoints of a minute.
    const LOW_MINUTES: u32 = 15;
    /// The original's task ends when a 20-second poll returns nothing.
    const POLL: Ms = 20_000;
    /// Messages that the original counts for one task.
    const MESSAGES_PER_TASK: u64 = 10;
    /// ECS places a waiting task this long after the instance registered.
    const PLACEMENT: Ms = 2_000;

    /// An original whose minute begins `phase` after the trace.
    pub fn new(max: u32, phase: Ms) -> Self {
        Self {
            max,
            phase,
            provisioning: 0,
            low_minutes: 0,
            alarm_metric: None,
        }
    }

    /// Its rule: proportional to the visible messages; running tasks do not
    /// count, pending ones do.
    fn autoscale(&mut self, world: &World) {
        let visible = world.visible();
        let (active, running) = world.tasks();
        let pending = active - running + self.provisioning;
        let scheduled = running + pending;
        if visible == 0 || scheduled >= self.max {
            return;
        }
        let room = u64::from(self.max - scheduled);
        let potential = u64::from(pending) * Self::MESSAGES_PER_TASK;
        let wanted = visible
            .checked_div(potential)
            .unwrap_or_else(|| visible.div_ceil(Self::MESSAGES_PER_TASK));
        self.provisioning += wanted.min(room) as u32;
    }

    fn place(&mut self, world: &mut World) {
        for instance in world.free_instances() {
            if self.provisioning == 0 {
                return;
            }
            self.provisioning -= 1;
            world.start_task(instance);
        }
    }

    /// CapacityProviderReservation: needed over existing instances; 200 % from zero.
    fn managed_scaling(&mut self, world: &mut World) {
        let needed = (world.tasks().0 + self.provisioning).min(self.max);
        let existing = world.living_in(0);
        let metric = match (needed, existing) {
            (0, 0) => 100.0,
            (_, 0) => 200.0,
            (needed, existing) => f64::from(needed) / f64::from(existing) * 100.0,
        };
        if metric > 100.0 {
            self.low_minutes = 0;
            self.alarm_metric = Some(metric);
            world.set_timer(world.now() + Self::ALARM_DELAY, Self::ALARM);
        } else if metric < 100.0 {
            self.low_minutes += 1;
            if self.low_minutes >= Self::LOW_MINUTES {
                self.low_minutes = 0;
                let target = (f64::from(existing) * metric / 100.0).ceil() as u32;
                // Managed termination protection: only instances without a task go.
                give_back_idle(world, existing - target.min(existing), false);
            }
        } else {
            self.low_minutes = 0;
        }
    }

    fn scale_out(&mut self, world: &mut World) {
        let Some(metric) = self.alarm_metric.take() else {
            return;
        };
        let existing = world.living_in(0);
        let target = if existing == 0 {
            2
        } else {
            (f64::from(existing) * metric / 100.0).ceil() as u32
        };
        if target > existing {
            world.set_desired(0, target.min(self.max));
        }
    }
}

impl Controller for Original {
    fn start(&mut self, world: &mut World) {
        world.idle_exit = Some(Self::POLL);
        world.set_timer(self.phase, Self::AUTOSCALER);
        // The two minutes are not synchronised.
        world.set_timer(
            (self.phase * 7 + 13_000) % Self::MINUTE,
            Self::MANAGED_SCALING,
        );
    }

    fn signal(&mut self, world: &mut World, signal: Signal) {
        match signal {
            Signal::Timer(Self::AUTOSCALER) => {
                self.autoscale(world);
                self.place(world);
                world.set_timer(world.now() + Self::MINUTE, Self::AUTOSCALER);
            }
            Signal::Timer(Self::MANAGED_SCALING) => {
                self.managed_scaling(world);
                world.set_timer(world.now() + Self::MINUTE, Self::MANAGED_SCALING);
            }
            Signal::Timer(Self::ALARM) => self.scale_out(world),
            Signal::Timer(Self::PLACE) => self.place(world),
            Signal::ContainerInstance => {
                world.set_timer(world.now() + Self::PLACEMENT, Self::PLACE);
            }
            _ => {}
        }
    }
}

/// Starts a worker on every new instance, as a Deployment or an endpoint does.
fn start_workers(world: &mut World) {
    for instance in world.free_instances() {
        world.start_task(instance);
    }
}

/// Asks for what is missing, or gives back what is idle and too many.
fn scale_to(world: &mut World, wanted: u32) {
    let existing = world.living_in(0);
    world.set_desired(0, wanted.max(existing));
    give_back_idle(world, existing.saturating_sub(wanted), true);
}

/// (b) KEDA with its defaults, on nodes that come and go with their pods.
pub struct Keda {
    max: u32,
    phase: Ms,
    replicas: u32,
    last_active: Ms,
    recommendations: VecDeque<(Ms, u32)>,
}

impl Keda {
    const POLL: u32 = 1;
    const HPA: u32 = 2;

    const POLL_INTERVAL: Ms = 30_000;
    const HPA_INTERVAL: Ms = 15_000;
    const QUEUE_LENGTH: u64 = 5;
    const COOL_DOWN: Ms = 300_000;
    const STABILIZATION: Ms = 300_000;

    /// A KEDA that polls `phase` after the trace's beginning.
    pub fn new(max: u32, phase: Ms) -> Self {
        Self {
            max,
            phase: phase % Self::POLL_INTERVAL,
            replicas: 0,
            last_active: 0,
            recommendations: VecDeque::new(),
        }
    }

    fn poll(&mut self, world: &mut World) {
        if world.backlog() > 0 {
            self.last_active = world.now();
            if self.replicas == 0 {
                self.scale(world, 1);
            }
        } else if self.replicas > 0 && world.now() - self.last_active >= Self::COOL_DOWN {
            self.scale(world, 0);
        }
    }

    fn horizontal(&mut self, world: &mut World) {
        if self.replicas == 0 {
            return;
        }
        let wanted = world.backlog().div_ceil(Self::QUEUE_LENGTH);
        let wanted = wanted.clamp(1, u64::from(self.max)) as u32;
        let now = world.now();
        self.recommendations.push_back((now, wanted));
        while self
            .recommendations
            .front()
            .is_some_and(|(at, _)| now - at > Self::STABILIZATION)
        {
            self.recommendations.pop_front();
        }
        let highest = self
            .recommendations
            .iter()
            .map(|(_, wanted)| *wanted)
            .max()
            .unwrap_or(wanted);
        self.scale(world, highest);
    }

    fn scale(&mut self, world: &mut World, replicas: u32) {
        self.replicas = replicas;
        scale_to(world, replicas);
    }
}

impl Controller for Keda {
    fn start(&mut self, world: &mut World) {
        world.set_timer(self.phase, Self::POLL);
        world.set_timer(self.phase / 2, Self::HPA);
    }

    fn signal(&mut self, world: &mut World, signal: Signal) {
        match signal {
            Signal::Timer(Self::POLL) => {
                self.poll(world);
                world.set_timer(world.now() + Self::POLL_INTERVAL, Self::POLL);
            }
            Signal::Timer(Self::HPA) => {
                self.horizontal(world);
                world.set_timer(world.now() + Self::HPA_INTERVAL, Self::HPA);
            }
            Signal::ContainerInstance => start_workers(world),
            _ => {}
        }
    }
}

/// (c) SageMaker asynchronous inference: target tracking on the backlog per
/// instance, and the alarm that wakes it from zero.
pub struct SageMaker {
    max: u32,
    phase: Ms,
    desired: u32,
    waiting_minutes: u32,
    high_minutes: u32,
    low_minutes: u32,
    last_change: Ms,
}

impl SageMaker {
    const METRIC: u32 = 1;

    const MINUTE: Ms = 60_000;
    const TARGET: f64 = 5.0;
    /// HasBacklogWithoutCapacity: two datapoints of a minute.
    const WAKE_MINUTES: u32 = 2;
    const HIGH_MINUTES: u32 = 3;
    const LOW_MINUTES: u32 = 15;
    const SCALE_OUT_COOL_DOWN: Ms = 300_000;
    const SCALE_IN_COOL_DOWN: Ms = 600_000;

    /// An endpoint whose metrics' minute begins `phase` after the trace.
    pub fn new(max: u32, phase: Ms) -> Self {
        Self {
            max,
            phase,
            desired: 0,
            waiting_minutes: 0,
            high_minutes: 0,
            low_minutes: 0,
            last_change: Ms::MIN / 2,
        }
    }

    fn metric(&mut self, world: &mut World) {
        let now = world.now();
        let backlog = world.backlog() as f64;
        let ready = world
            .living()
            .into_iter()
            .filter(|instance| world.is_ready(*instance))
            .count() as f64;
        if self.desired == 0 {
            self.waiting_minutes = if backlog > 0.0 {
                self.waiting_minutes + 1
            } else {
                0
            };
            if self.waiting_minutes >= Self::WAKE_MINUTES {
                self.waiting_minutes = 0;
                self.set(world, 1);
            }
            return;
        }
        let per_instance = backlog / ready.max(1.0);
        let target = f64::from(self.desired) * per_instance / Self::TARGET;
        if per_instance > Self::TARGET {
            self.high_minutes += 1;
            self.low_minutes = 0;
            let rested = now - self.last_change >= Self::SCALE_OUT_COOL_DOWN;
            if self.high_minutes >= Self::HIGH_MINUTES && rested {
                self.high_minutes = 0;
                let wanted = target.ceil().min(f64::from(self.max)) as u32;
                self.set(world, wanted.max(self.desired));
            }
        } else if per_instance < Self::TARGET * 0.9 && ready > 0.0 {
            self.low_minutes += 1;
            self.high_minutes = 0;
            let rested = now - self.last_change >= Self::SCALE_IN_COOL_DOWN;
            if self.low_minutes >= Self::LOW_MINUTES && rested {
                self.low_minutes = 0;
                let wanted = target.ceil() as u32;
                self.set(world, wanted.min(self.desired));
            }
        } else {
            self.high_minutes = 0;
            self.low_minutes = 0;
        }
    }

    fn set(&mut self, world: &mut World, wanted: u32) {
        if wanted == self.desired {
            return;
        }
        self.last_change = world.now();
        scale_to(world, wanted);
        self.desired = wanted;
    }
}

impl Controller for SageMaker {
    fn start(&mut self, world: &mut World) {
        world.set_timer(self.phase, Self::METRIC);
    }

    fn signal(&mut self, world: &mut World, signal: Signal) {
        match signal {
            Signal::Timer(Self::METRIC) => {
                self.metric(world);
                world.set_timer(world.now() + Self::MINUTE, Self::METRIC);
            }
            Signal::ContainerInstance => start_workers(world),
            _ => {}
        }
    }
}
