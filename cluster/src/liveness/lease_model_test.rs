//! Every order of events of one node and three voters, with the real state machines: heartbeats that are lost or late,
//! voters that lag behind the log, restart and forget what they had applied and not yet stored, suspicions that are wrong
//! and taken back, leaders that change, a node whose clock is slower. Whatever happens, the node is declared down only when
//! its lease has ended on its own clock.
//!
//! A new leader that has been told nothing yet could do less than one that has: it needs no step of its own.
//! Answers arrive at once: a lease counts from the sending of the heartbeat, so a late answer never makes it longer.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::detector::{Unanswered, lease_is_over};
use super::{Electorate, Holder, Reply, Settings, Standing, Voter};
use crate::state::{NodeId, NodeStatus};

const NODE: NodeId = 9;
const VOTERS: [NodeId; 3] = [1, 2, 3];
/// Ticks of the model.
const END: u64 = 3;

fn settings() -> Settings {
    // A tick is a millisecond; the node's clock may lose one tick of a lease.
    Settings { lease_ms: 1, drift_per_mille: 1000, freeze_ms: 0, ..Settings::default() }
}

fn voters() -> Electorate {
    Electorate { since: (1, 1), sets: vec![BTreeSet::from(VOTERS)] }
}

fn voter(now: u64) -> Voter {
    let mut voter = Voter::new(now);
    voter.votes_since(now, (1, 1));
    voter
}

/// What the log says of the node after this many entries: each suspicion is one of its own.
fn standing(log: &[NodeStatus], applied: usize) -> Option<Standing> {
    let status = log[applied];
    let suspicion = if status == NodeStatus::Up { 0 } else { applied as u64 };
    Some(Standing { status, suspicion })
}

/// How far is looked.
#[derive(Clone, Copy)]
struct Limits {
    /// Entries of the log, with that before all.
    entries: usize,
    /// Voters say something only when they have applied the suspicion.
    fence: bool,
    /// And only when it is stored, so that a restart does not undo it.
    stored: bool,
}

#[derive(Debug, Clone)]
struct World {
    now: u64,
    /// Ticks that the node's clock has lost.
    slow: u64,
    holder: Holder,
    /// Heartbeats on their way: number, voter.
    sent: BTreeSet<(u64, NodeId)>,
    /// When each heartbeat was sent, on the node's clock.
    beats: Vec<u64>,
    /// Heartbeats that were answered: number, voter.
    answered: BTreeSet<(u64, NodeId)>,
    /// What the log says of the node after each entry; the first is before all.
    log: Vec<NodeStatus>,
    /// State machine and applied entries of each voter.
    voters: BTreeMap<NodeId, (Voter, usize)>,
    /// How many entries the voter that may restart has stored as applied; the others never lose any.
    stored: usize,
    restarts: u8,
    /// What voters told the present leader: for how long, and when that came.
    told: BTreeMap<NodeId, (u64, u64)>,
}

impl World {
    fn new() -> Self {
        Self {
            now: 0,
            slow: 0,
            holder: Holder::new(settings()),
            sent: BTreeSet::new(),
            beats: Vec::new(),
            answered: BTreeSet::new(),
            log: vec![NodeStatus::Up],
            voters: VOTERS.iter().map(|v| (*v, (voter(0), 0))).collect(),
            stored: 0,
            restarts: 0,
            told: BTreeMap::new(),
        }
    }

    fn holds_lease(&self) -> bool {
        self.holder.lease(u64::MAX).is_some_and(|lease| lease.until_ms > self.now - self.slow)
    }

    fn suspected(&self) -> bool {
        self.log.last() == Some(&NodeStatus::Suspected)
    }

    fn down_is_safe(&self) -> bool {
        let told = self.told.iter().map(|(voter, (for_ms, at_ms))| {
            (*voter, Unanswered { for_ms: *for_ms, at_ms: *at_ms, electorate: (1, 1) })
        });
        lease_is_over(self.now, &told.collect(), &voters(), &settings())
    }

    /// What the future depends on. The last two voters are alike, so it does not matter which is which.
    fn key(&self) -> impl Eq + std::hash::Hash + use<> {
        let numbers = |pairs: &BTreeSet<(u64, NodeId)>, voter| {
            pairs.iter().filter(|(_, v)| *v == voter).map(|(number, _)| *number).collect::<Vec<u64>>()
        };
        let mut voters = VOTERS.map(|voter| {
            let (state, applied) = &self.voters[&voter];
            let suspected = Some(Standing { status: NodeStatus::Suspected, suspicion: 0 });
            let since = state.unanswered_ms(self.now, NODE, suspected, 0);
            let told = self.told.get(&voter).map(|(for_ms, at_ms)| for_ms + self.now - at_ms);
            (since, *applied, numbers(&self.sent, voter), numbers(&self.answered, voter), told)
        });
        voters[1..].sort_unstable();
        (self.now, self.slow, self.beats.clone(), self.log.clone(), self.restarts, self.stored, voters)
    }

    fn next(&self, limits: Limits) -> Vec<World> {
        let mut all = Vec::new();
        let mut step = |change: &dyn Fn(&mut World)| {
            let mut next = self.clone();
            change(&mut next);
            all.push(next);
        };
        if self.now < END {
            step(&|w| w.now += 1);
            if self.slow * 3 < self.now {
                step(&|w| {
                    w.now += 1;
                    w.slow += 1;
                });
            }
        }
        if self.beats.is_empty() {
            step(&|w| {
                let number = w.holder.beat(w.now - w.slow, &voters());
                w.beats.push(w.now - w.slow);
                w.sent.extend(VOTERS.map(|voter| (number, voter)));
            });
        }
        for (number, voter) in &self.sent {
            // That it is lost is that it never arrives.
            step(&|w| {
                w.sent.remove(&(*number, *voter));
                let (now, log) = (w.now, w.log.clone());
                let (state, applied) = w.voters.get_mut(voter).unwrap();
                let answered = state.heartbeat(now, NODE, true, standing(&log, *applied));
                if answered {
                    w.answered.insert((*number, *voter));
                }
                let reply = Reply { voter: *voter, answered, revision: 0, electorate: (1, 1) };
                w.holder.reply(*number, reply, &voters());
            });
        }
        for (voter, (state, applied)) in &self.voters {
            if applied + 1 < self.log.len() {
                step(&|w| w.voters.get_mut(voter).unwrap().1 += 1);
            }
            // All voters are alike: that it is this one loses nothing.
            if self.restarts < 1 && *voter == VOTERS[0] {
                step(&|w| {
                    w.restarts += 1;
                    w.voters.insert(*voter, (self::voter(w.now), w.stored));
                });
            }
            if self.restarts < 1 && *voter == VOTERS[0] && self.stored < *applied {
                step(&|w| w.stored = *applied);
            }
            // The voter speaks only when it has applied this very suspicion; without a fence it always does.
            let suspicion = self.log.len() as u64 - 1;
            let applied = if limits.fence { *applied } else { self.log.len() - 1 };
            let known = self.told.get(voter).map(|(for_ms, at_ms)| for_ms + self.now - at_ms);
            let standing = standing(&self.log, applied);
            let stored = *voter != VOTERS[0] || self.stored as u64 >= suspicion || !limits.stored;
            let told = state.unanswered_ms(self.now, NODE, standing, suspicion);
            let told = told.filter(|_| self.suspected() && stored);
            // One that says no more than before changes nothing that the leader may do.
            if let Some(for_ms) = told.filter(|for_ms| known.is_none_or(|known| known < *for_ms)) {
                step(&|w| {
                    w.told.insert(*voter, (for_ms, w.now));
                });
            }
        }
        if !self.suspected() && self.log.len() < limits.entries {
            step(&|w| w.log.push(NodeStatus::Suspected));
        }
        if self.suspected() && self.log.len() + 1 < limits.entries {
            step(&|w| {
                w.log.push(NodeStatus::Up);
                w.told.clear();
            });
        }
        all
    }
}

/// Looks at all states; answers how many there are, and the first in which a node with a lease could be declared down.
fn explore(limits: Limits) -> (usize, Option<World>) {
    let mut seen = HashSet::new();
    let mut open = vec![World::new()];
    while let Some(world) = open.pop() {
        // Once it is down nothing renews the lease: nobody answers a node that is not up.
        if world.suspected() && world.down_is_safe() && world.holds_lease() {
            return (seen.len(), Some(world));
        }
        open.extend(world.next(limits).into_iter().filter(|next| seen.insert(next.key())));
        assert!(seen.len() < 5_000_000, "too many states to look at");
    }
    (seen.len(), None)
}

#[test]
fn no_node_is_declared_down_while_its_lease_lasts() {
    // A lease comes from one heartbeat, and other ones only make voters answer later: one is enough. The suspicion is taken
    // back and comes again.
    let (states, broken) = explore(Limits { entries: 4, fence: true, stored: true });
    assert!(broken.is_none(), "{broken:#?}");
    assert!(states > 1_000, "{states}");
}

#[test]
fn without_the_fence_of_the_log_the_model_finds_two_leases() {
    assert!(explore(Limits { entries: 2, fence: false, stored: false }).1.is_some());
}

#[test]
fn when_voters_speak_of_what_they_have_not_stored_the_model_finds_two_leases() {
    assert!(explore(Limits { entries: 2, fence: true, stored: false }).1.is_some());
}
