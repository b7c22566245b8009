//! The scaler of this project: its real planner, woken as it is on AWS.

use std::time::Duration;

use planner::cadence::{NEXT_PASSES, RECALL_LOOK, WAKE_INTERVAL};
use planner::{Observation, Plan, Policy, plan};

use crate::world::{Chaos, Controller, Ms, Signal, World};

/// The schedule's minute.
const MINUTE: u32 = 1;
/// A wake by an event.
const WAKE: u32 = 2;
/// Another pass of the same run.
const PASS: u32 = 3;
/// A plan made a moment ago, carried out now.
const STALE: u32 = 4;
/// A second look before something is called back.
const LOOK: u32 = 5;

/// From a send to the scaler's decision, by way of intake's invoke.
const INTAKE_DELAY: Ms = 1_000;
/// From an ECS or Auto Scaling event to the decision, by way of EventBridge.
const EVENT_DELAY: Ms = 1_500;

fn ms(time: Duration) -> Ms {
    time.as_millis() as Ms
}

pub struct Ours {
    policy: Policy,
    phase: Ms,
    last_intake: Ms,
    passes_left: usize,
    looked: bool,
    stale: Vec<Plan>,
    /// Every run is checked with this.
    pub inspect: Option<fn(&Observation, &Policy, &Plan)>,
    pub runs: u64,
}

impl Ours {
    /// A scaler whose minute begins `phase` after the trace.
    pub fn new(policy: Policy, phase: Ms) -> Self {
        Self {
            policy,
            phase,
            last_intake: Ms::MIN / 2,
            passes_left: 0,
            looked: false,
            stale: Vec::new(),
            inspect: None,
            runs: 0,
        }
    }

    fn run(&mut self, world: &mut World) {
        self.runs += 1;
        let Some(observation) = world.observe() else {
            self.again(world);
            return;
        };
        let plan = plan(&observation, &self.policy);
        if let Some(inspect) = self.inspect {
            inspect(&observation, &self.policy, &plan);
        }
        if !self.looked && plan.calls_back {
            self.looked = true;
            world.set_timer(world.now() + ms(RECALL_LOOK), LOOK);
            return;
        }
        self.looked = false;
        let succeeded = world.apply(&plan);
        if !succeeded || plan.stops_a_task() {
            self.again(world);
        }
        self.maybe_repeat(world, plan);
    }

    fn again(&mut self, world: &mut World) {
        if self.passes_left > 0 {
            let wait = ms(NEXT_PASSES[NEXT_PASSES.len() - self.passes_left]);
            self.passes_left -= 1;
            world.set_timer(world.now() + wait, PASS);
        }
    }

    /// Sometimes a second run with the same observation acts a moment later.
    fn maybe_repeat(&mut self, world: &mut World, plan: Plan) {
        if plan.decisions.is_empty() {
            return;
        }
        let Some(chaos) = &mut world.chaos else {
            return;
        };
        if chaos.rng.f64() < 0.02 {
            let wait = (chaos.rng.f64() * 3_000.0) as Ms;
            self.stale.push(plan);
            let at = world.now() + wait;
            world.set_timer(at, STALE);
        }
    }

    fn wake(&mut self, world: &mut World, delay: Ms) {
        let mut delay = delay;
        let mut twice = false;
        if let Some(Chaos { rng, .. }) = &mut world.chaos {
            // Events are late, sometimes very, and sometimes come twice.
            delay += (rng.f64() * 2_000.0) as Ms;
            if rng.f64() < 0.01 {
                delay += (rng.f64() * 90_000.0) as Ms;
            }
            twice = rng.f64() < 0.02;
        }
        let at = world.now() + delay;
        world.set_timer(at, WAKE);
        if twice {
            world.set_timer(at + 500, WAKE);
        }
    }

    fn fresh_run(&mut self, world: &mut World) {
        self.passes_left = NEXT_PASSES.len();
        self.looked = false;
        self.run(world);
    }
}

impl Controller for Ours {
    fn start(&mut self, world: &mut World) {
        world.idle_exit = Some(Ms::from(self.policy.idle_exit_seconds) * 1000);
        world.set_timer(self.phase, MINUTE);
    }

    fn signal(&mut self, world: &mut World, signal: Signal) {
        match signal {
            Signal::Timer(MINUTE) => {
                let next = world.now() + 60_000;
                world.set_timer(next, MINUTE);
                self.fresh_run(world);
            }
            Signal::Timer(WAKE) => self.fresh_run(world),
            Signal::Timer(PASS | LOOK) => self.run(world),
            Signal::Timer(STALE) => {
                if let Some(plan) = self.stale.pop() {
                    world.apply(&plan);
                }
            }
            Signal::Timer(_) => {}
            Signal::Arrived => {
                if world.now() - self.last_intake >= ms(WAKE_INTERVAL) {
                    self.last_intake = world.now();
                    self.wake(world, INTAKE_DELAY);
                }
            }
            Signal::Task | Signal::ContainerInstance | Signal::Group => {
                self.wake(world, EVENT_DELAY);
            }
        }
    }
}
