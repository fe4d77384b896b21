//! A voter's part: it answers heartbeats, and says for how long it has not.

use std::collections::BTreeMap;

use super::{EntryId, Standing};
use crate::state::{NodeId, NodeStatus};

/// What a voter knows of heartbeats. Begins empty with the process and with each change of who votes: what it did before is
/// taken to have been just then.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Voter {
    began_ms: u64,
    /// The entry that says who votes.
    electorate: EntryId,
    heard: BTreeMap<NodeId, u64>,
    answered: BTreeMap<NodeId, u64>,
}

impl Voter {
    /// A voter whose process began at `now_ms`.
    pub fn new(now_ms: u64) -> Self {
        Self { began_ms: now_ms, electorate: (0, 0), heard: BTreeMap::new(), answered: BTreeMap::new() }
    }

    /// Who votes is said by this entry.
    pub fn votes_since(&mut self, now_ms: u64, electorate: EntryId) {
        if self.electorate != electorate {
            *self = Self { electorate, ..Self::new(now_ms) };
        }
    }

    /// A heartbeat of `node` came, which says whether a majority replies to it. Answers whether it is answered: `standing` is
    /// what the applied state says of the node, if it knows it.
    pub fn heartbeat(
        &mut self,
        now_ms: u64,
        node: NodeId,
        connected: bool,
        standing: Option<Standing>,
    ) -> bool {
        if connected {
            self.heard.insert(node, now_ms);
        }
        let answers = standing.is_some_and(|standing| standing.status == NodeStatus::Up);
        if answers {
            self.answered.insert(node, now_ms);
        }
        answers
    }

    /// For how long `node` has been silent. One that was never heard is silent since this voter began.
    pub fn silent_ms(&self, now_ms: u64, node: NodeId) -> u64 {
        now_ms.saturating_sub(self.heard.get(&node).copied().unwrap_or(self.began_ms))
    }

    /// Whether `node` was heard within this time.
    pub fn has_heard(&self, now_ms: u64, node: NodeId, within_ms: u64) -> bool {
        self.heard.get(&node).is_some_and(|at| now_ms.saturating_sub(*at) <= within_ms)
    }

    /// For how long this voter has not answered `node`, for certain; `None` when it may answer at any moment, because its
    /// applied state knows nothing of this suspicion, or no longer.
    pub fn unanswered_ms(
        &self,
        now_ms: u64,
        node: NodeId,
        standing: Option<Standing>,
        suspicion: u64,
    ) -> Option<u64> {
        let last = self.answered.get(&node).copied().unwrap_or(self.began_ms);
        let suspects = |s: Standing| s.status != NodeStatus::Up && s.suspicion == suspicion;
        standing.is_some_and(suspects).then(|| now_ms.saturating_sub(last))
    }

    /// Forgets nodes that are no longer known.
    pub fn retain(&mut self, known: impl Fn(NodeId) -> bool) {
        self.heard.retain(|node, _| known(*node));
        self.answered.retain(|node, _| known(*node));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(status: NodeStatus, suspicion: u64) -> Option<Standing> {
        Some(Standing { status, suspicion })
    }

    #[test]
    fn a_voter_speaks_about_the_suspicion_that_it_has_applied_and_no_other() {
        let mut voter = Voter::new(0);
        voter.votes_since(0, (1, 1));
        assert!(voter.heartbeat(10, 9, true, standing(NodeStatus::Up, 0)));
        assert!(!voter.heartbeat(20, 9, true, standing(NodeStatus::Suspected, 7)));
        assert!(!voter.heartbeat(20, 9, true, None), "a node that nobody knows");
        let asked = |status, suspicion| voter.unanswered_ms(100, 9, standing(status, suspicion), 7);
        assert_eq!(asked(NodeStatus::Suspected, 7), Some(90));
        assert_eq!(asked(NodeStatus::Up, 0), None, "it may answer at any moment");
        assert_eq!(asked(NodeStatus::Suspected, 5), None, "another suspicion");
    }

    #[test]
    fn who_votes_changes_and_a_voter_begins_anew() {
        let mut voter = Voter::new(0);
        voter.votes_since(0, (1, 1));
        assert_eq!(voter.unanswered_ms(900, 9, standing(NodeStatus::Down, 7), 7), Some(900));
        voter.votes_since(900, (1, 4));
        assert_eq!(voter.unanswered_ms(950, 9, standing(NodeStatus::Down, 7), 7), Some(50));
        voter.votes_since(1000, (1, 4));
        assert_eq!(voter.unanswered_ms(1000, 9, standing(NodeStatus::Down, 7), 7), Some(100));
    }

    #[test]
    fn a_node_to_which_no_majority_replies_is_silent() {
        let mut voter = Voter::new(0);
        voter.heartbeat(100, 9, true, standing(NodeStatus::Up, 0));
        voter.heartbeat(500, 9, false, standing(NodeStatus::Up, 0));
        assert_eq!(voter.silent_ms(500, 9), 400);
        assert!(voter.has_heard(500, 9, 400) && !voter.has_heard(500, 9, 399));
        assert!(!voter.has_heard(1, 8, 1_000), "a voter that has just begun has heard nobody");
    }
}
