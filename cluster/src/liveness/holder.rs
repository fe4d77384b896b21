//! A node's part: heartbeats, and the lease that their answers give.

use std::collections::{BTreeMap, BTreeSet};

use super::{Electorate, EntryId, Settings};
use crate::state::NodeId;

/// Most heartbeats whose answers are waited for.
const OUTSTANDING_MAX: usize = 16;

/// A lease that a majority has given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Renewal {
    /// Until when, in milliseconds of this node's clock.
    pub until_ms: u64,
    /// It is about VMs that this node's plan lists once this revision is applied here.
    pub revision: u64,
}

/// What a voter replied to a heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// Which.
    pub voter: NodeId,
    /// It answers: the node is up in its applied state.
    pub answered: bool,
    /// How far it had applied the log.
    pub revision: u64,
    /// The entry by which it knew who votes.
    pub electorate: EntryId,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Beat {
    sent_ms: u64,
    /// The entry by which this node knew who votes.
    electorate: EntryId,
    replied: BTreeSet<NodeId>,
    answered: BTreeSet<NodeId>,
    revision: u64,
}

/// Heartbeats and the lease of this node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Holder {
    settings: Settings,
    next: u64,
    beats: BTreeMap<u64, Beat>,
    newest: Option<Renewal>,
    /// When the newest heartbeat was sent to which a majority replied.
    reached_ms: Option<u64>,
}

impl Holder {
    /// A node without a lease yet.
    pub fn new(settings: Settings) -> Self {
        Self { settings, next: 0, beats: BTreeMap::new(), newest: None, reached_ms: None }
    }

    /// What the cluster says about times. It always says the same; a node that has just begun may not know it yet.
    pub fn set(&mut self, settings: Settings) {
        self.settings = settings;
    }

    /// Number of the heartbeat that is sent to all voters now.
    pub fn beat(&mut self, now_ms: u64, voters: &Electorate) -> u64 {
        let number = self.next;
        self.next = self.next.saturating_add(1);
        let beat = Beat {
            sent_ms: now_ms,
            electorate: voters.since,
            replied: BTreeSet::new(),
            answered: BTreeSet::new(),
            revision: 0,
        };
        self.beats.insert(number, beat);
        while self.beats.len() > OUTSTANDING_MAX {
            self.beats.pop_first();
        }
        number
    }

    /// A voter replied to heartbeat `number`. It counts when voter and node know the same voters, then as now.
    pub fn reply(&mut self, number: u64, reply: Reply, voters: &Electorate) {
        let same = |beat: &&mut Beat| beat.electorate == voters.since && reply.electorate == voters.since;
        let Some(beat) = self.beats.get_mut(&number).filter(same) else { return };
        beat.replied.insert(reply.voter);
        if voters.is_majority(|voter| beat.replied.contains(&voter)) {
            self.reached_ms = self.reached_ms.max(Some(beat.sent_ms));
        }
        if !reply.answered {
            return;
        }
        beat.answered.insert(reply.voter);
        beat.revision = beat.revision.max(reply.revision);
        if voters.is_majority(|voter| beat.answered.contains(&voter)) {
            let until_ms = beat.sent_ms.saturating_add(self.settings.lease_ms);
            self.newest = self.newest.max(Some(Renewal { until_ms, revision: beat.revision }));
        }
    }

    /// The lease, once this node has applied what its voters had: its own plan may be older than what they know.
    pub fn lease(&self, applied: u64) -> Option<Renewal> {
        self.newest.filter(|renewal| renewal.revision <= applied)
    }

    /// Whether a majority of the voters replies to this node, be it that they refuse.
    pub fn is_connected(&self, now_ms: u64) -> bool {
        self.reached_ms.is_some_and(|at| now_ms.saturating_sub(at) <= self.settings.suspect_after_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings { lease_ms: 100, suspect_after_ms: 40, ..Settings::default() }
    }

    fn yes(voter: NodeId, revision: u64) -> Reply {
        Reply { voter, answered: true, revision, electorate: (1, 1) }
    }

    #[test]
    fn a_lease_counts_from_the_sending_of_a_heartbeat_that_a_majority_answered() {
        let voters = Electorate { since: (1, 1), sets: vec![BTreeSet::from([1, 2, 3])] };
        let mut holder = Holder::new(settings());
        let first = holder.beat(10, &voters);
        for reply in [yes(1, 5), yes(1, 5), yes(9, 5)] {
            holder.reply(first, reply, &voters);
        }
        assert_eq!(holder.lease(9), None, "one voter, and one that is none");
        let second = holder.beat(50, &voters);
        holder.reply(first, yes(2, 7), &voters);
        assert_eq!(holder.lease(6), None, "it does not know yet what they knew");
        assert_eq!(holder.lease(7), Some(Renewal { until_ms: 110, revision: 7 }));
        holder.reply(second, yes(3, 6), &voters);
        holder.reply(second, yes(1, 6), &voters);
        assert_eq!(holder.lease(7).map(|lease| lease.until_ms), Some(150));
    }

    #[test]
    fn answers_count_when_all_know_the_same_voters_and_of_both_sets_while_they_change() {
        let old = Electorate { since: (1, 1), sets: vec![BTreeSet::from([1, 2, 3])] };
        let both =
            Electorate { since: (1, 4), sets: vec![BTreeSet::from([1, 2, 3]), BTreeSet::from([1, 4, 5])] };
        let mut holder = Holder::new(settings());
        let first = holder.beat(0, &old);
        for voter in [2, 3] {
            holder.reply(first, yes(voter, 0), &both);
        }
        assert_eq!(holder.lease(9), None, "they knew other voters than this node does now");
        let second = holder.beat(10, &both);
        let answer = |voter| Reply { electorate: (1, 4), ..yes(voter, 0) };
        for voter in [2, 3, 4] {
            holder.reply(second, answer(voter), &both);
        }
        assert_eq!(holder.lease(9), None, "no majority of those to come");
        holder.reply(second, answer(5), &both);
        assert_eq!(holder.lease(9).map(|lease| lease.until_ms), Some(110));
        assert!(!Electorate::default().is_majority(|_| true), "nobody votes");
    }

    #[test]
    fn a_node_is_connected_while_a_majority_replies_even_if_it_refuses() {
        let voters = Electorate { since: (1, 1), sets: vec![BTreeSet::from([1, 2, 3])] };
        let mut holder = Holder::new(settings());
        let beat = holder.beat(0, &voters);
        let no = |voter| Reply { answered: false, ..yes(voter, 0) };
        holder.reply(beat, no(1), &voters);
        assert!(!holder.is_connected(1));
        holder.reply(beat, no(2), &voters);
        assert!(holder.is_connected(40) && !holder.is_connected(41));
        assert_eq!(holder.lease(9), None);
    }
}
