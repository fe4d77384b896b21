//! What goes wrong, and when it is repaired. Each seed has its own selection of faults: a seed with few kinds of them goes deeper into
//! those.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use blixard_node::state::NodeId;
use tokio::time::Instant;

use crate::dice::Dice;
use crate::disk::Mood;
use crate::member::Member;
use crate::world::World;

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A node process dies.
    Crash,
    /// A host loses its power.
    Power,
    /// The nodes are in two halves that do not hear each other.
    Split,
    /// One way between two nodes is cut in one direction.
    OneWay,
    /// One node hears nobody, or nobody hears it, or both.
    Isolate,
    /// A way is slow.
    Slow,
    /// Connections break.
    Break,
    /// A disk is slow.
    SlowDisk,
    /// A disk is full, or fails.
    BadDisk,
    /// Unix time of a host is set.
    Clock,
    /// An agent dies for a moment.
    Agent,
    /// Leadership is handed over.
    Transfer,
}

const KINDS: [Kind; 12] = [
    Kind::Crash,
    Kind::Power,
    Kind::Split,
    Kind::OneWay,
    Kind::Isolate,
    Kind::Slow,
    Kind::Break,
    Kind::SlowDisk,
    Kind::BadDisk,
    Kind::Clock,
    Kind::Agent,
    Kind::Transfer,
];

/// A repair that is due at a time.
#[derive(Debug, Clone)]
enum Repair {
    Open(Vec<(NodeId, NodeId)>),
    Quick(NodeId, NodeId),
    Disk(NodeId),
}

/// Faults of one run.
pub struct Faults {
    dice: Dice,
    kinds: Vec<Kind>,
    per_mille: u64,
    repairs: Vec<(Instant, Repair)>,
}

impl Faults {
    /// A selection.
    pub fn new(mut dice: Dice) -> Self {
        let share = dice.pick(&[150, 400, 800]).unwrap_or(400);
        let kinds: Vec<Kind> = KINDS.into_iter().filter(|_| dice.chance(share)).collect();
        let per_mille = dice.pick(&[80, 200, 400]).unwrap_or(200);
        Self { dice, kinds, per_mille, repairs: Vec::new() }
    }

    /// Which kinds there are.
    pub fn kinds(&self) -> &[Kind] {
        &self.kinds
    }

    fn later(&mut self, from_ms: u64, to_ms: u64, repair: Repair) {
        let at = Instant::now() + self.dice.millis(from_ms..=to_ms);
        self.repairs.push((at, repair));
    }

    fn repair(world: &mut World, repair: Repair) {
        world.trace.note(format_args!("repaired: {repair:?}"));
        match repair {
            Repair::Open(ways) => ways.iter().for_each(|(from, to)| world.network.cut(*from, *to, false)),
            Repair::Quick(from, to) => world.network.slow(from, to, 0),
            Repair::Disk(node) => {
                if let Some(place) = world.places.get(&node) {
                    place.machine.disk.set_mood(Mood::Good);
                }
            }
        }
    }

    /// What is due is repaired.
    pub fn repair_due(&mut self, world: &mut World) {
        let now = Instant::now();
        let (due, later) = std::mem::take(&mut self.repairs).into_iter().partition(|(at, _)| *at <= now);
        self.repairs = later;
        let due: Vec<(Instant, Repair)> = due;
        due.into_iter().for_each(|(_, repair)| Self::repair(world, repair));
    }

    /// When the next repair is due.
    pub fn next_repair(&self) -> Option<Instant> {
        self.repairs.iter().map(|(at, _)| *at).min()
    }

    /// Everything is repaired, and what is down starts soon.
    pub fn end(&mut self, world: &mut World) {
        for (_, repair) in std::mem::take(&mut self.repairs) {
            Self::repair(world, repair);
        }
        let soon = Instant::now() + Duration::from_millis(200);
        for place in world.places.values_mut() {
            place.again = place.again.map(|at| at.min(soon));
            place.machine.host.clock.set(0);
        }
    }

    /// Perhaps something goes wrong now.
    pub async fn strike(&mut self, world: &mut World) {
        if !self.dice.chance(self.per_mille) {
            return;
        }
        let Some(kind) = self.dice.pick(&self.kinds) else { return };
        let nodes: Vec<NodeId> = world.places.keys().copied().collect();
        let Some(node) = self.dice.pick(&nodes) else { return };
        let others: Vec<NodeId> = nodes.iter().copied().filter(|other| *other != node).collect();
        let Some(other) = self.dice.pick(&others) else { return };
        world.trace.note(format_args!("fault: {kind:?} {node} {other}"));
        match kind {
            Kind::Crash => {
                let back = self.dice.millis(50..=4_000);
                world.kill(node, false, back);
            }
            Kind::Power => {
                let back = self.dice.millis(500..=12_000);
                world.kill(node, true, back);
            }
            Kind::Split => {
                let ours: BTreeSet<NodeId> =
                    nodes.iter().copied().filter(|_| self.dice.chance(500)).collect();
                let apart = |(a, b): &(NodeId, NodeId)| ours.contains(a) != ours.contains(b);
                let ways = nodes.iter().flat_map(|a| nodes.iter().map(|b| (*a, *b))).filter(apart).collect();
                self.cut(world, ways);
            }
            Kind::OneWay => self.cut(world, vec![(node, other)]),
            Kind::Isolate => {
                let hears = self.dice.chance(300);
                let heard = !hears && self.dice.chance(300);
                let to = others.iter().map(|other| (node, *other)).filter(|_| !heard);
                let from = others.iter().map(|other| (*other, node)).filter(|_| !hears);
                let ways = to.chain(from).collect();
                self.cut(world, ways);
            }
            Kind::Slow => {
                let slow_ms = self.dice.pick(&[20, 100, 400, 1500]).unwrap_or(20);
                world.network.slow(node, other, slow_ms);
                self.later(500, 6_000, Repair::Quick(node, other));
            }
            Kind::Break => world.network.break_connections(node, other),
            Kind::SlowDisk | Kind::BadDisk => {
                let moods = if kind == Kind::SlowDisk { [Mood::Slow; 2] } else { [Mood::Full, Mood::Broken] };
                let mood = self.dice.pick(&moods).unwrap_or(Mood::Slow);
                if let Some(place) = world.places.get(&node) {
                    place.machine.disk.set_mood(mood);
                }
                self.later(500, 5_000, Repair::Disk(node));
            }
            Kind::Clock => {
                let ahead_ms = self.dice.pick(&[-3_600_000, -70_000, -5_000, 0, 5_000, 70_000, 3_600_000]);
                if let Some(place) = world.places.get(&node) {
                    place.machine.host.clock.set(ahead_ms.unwrap_or(0));
                }
            }
            Kind::Agent => {
                if let Some(place) = world.places.get(&node).filter(|place| place.powered) {
                    let (host, back) = (Arc::clone(&place.machine.host), self.dice.millis(10..=80));
                    host.end_agent();
                    // By itself, whatever else is waited for here: a lease may end meanwhile.
                    tokio::spawn(async move {
                        tokio::time::sleep(back).await;
                        host.restart_agent();
                    });
                }
            }
            Kind::Transfer => {
                if let Some(Member { consensus, .. }) = world.running.get(node) {
                    let transfer = async move { consensus.transfer(other, Duration::from_millis(500)).await };
                    tokio::spawn(transfer);
                }
            }
        }
    }

    fn cut(&mut self, world: &mut World, ways: Vec<(NodeId, NodeId)>) {
        ways.iter().for_each(|(from, to)| world.network.cut(*from, *to, true));
        self.later(100, 9_000, Repair::Open(ways));
    }
}
