//! Heartbeats between members, outside of the log: what this node answers as a voter, and how it asks the others. Which
//! questions there are and when they are asked is `liveness/`'s.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use openraft::type_config::async_runtime::watch::WatchReceiver;
use serde::de::DeserializeOwned;

use super::Consensus;
use super::peer::call::{Beaten, Question, Unanswered};
use crate::liveness::{Electorate, EntryId, Pulse, Reply, Standing};
use crate::state::{NodeId, State};

/// Longest wait for the reply to a heartbeat or a question of the leader.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// Longest wait for a node that is silent.
const REACH_MAX: Duration = Duration::from_millis(400);

/// What the applied state says of a node.
fn standing(state: &State, node: NodeId) -> Option<Standing> {
    let offer = &state.node(node)?.offer;
    Some(Standing { status: offer.status, suspicion: offer.suspicion })
}

impl Consensus {
    /// This node's part as holder and voter.
    pub fn pulse(&self) -> &Pulse {
        &self.pulse
    }

    /// Who votes, by the newest entry that this node has, applied or not.
    pub fn electorate(&self) -> Electorate {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let stored = &metrics.membership_config;
        let since = stored.log_id().as_ref().map_or((0, 0), |id| (id.leader_id.term, id.index));
        Electorate { since, sets: stored.membership().get_joint_config().clone() }
    }

    /// The present term, while this node leads.
    pub fn leading_term(&self) -> Option<u64> {
        let numbers = self.numbers();
        numbers.leads.then_some(numbers.term)
    }

    /// What the applied state says of each node.
    pub fn standings(&self) -> BTreeMap<NodeId, Standing> {
        let state = self.replica.state();
        state.nodes().filter_map(|node| Some((node.id, standing(&state, node.id)?))).collect()
    }

    /// A heartbeat of `node` came to this voter.
    pub fn heartbeat_of(&self, node: NodeId, connected: bool, now_ms: u64) -> Beaten {
        // The voter is held while the state is read: who asks it how long it has not answered hears of this answer, or
        // has applied the suspicion before.
        let mut voter = self.pulse.voter();
        let electorate: EntryId = self.electorate().since;
        voter.votes_since(now_ms, electorate);
        let (standing, revision) = {
            let state = self.replica.state();
            (standing(&state, node), state.revision())
        };
        let answered = voter.heartbeat(now_ms, node, connected, standing);
        Beaten { answered, revision, electorate }
    }

    /// For how long this voter has not answered a node that is suspected since `suspicion`.
    pub fn unanswered(&self, node: NodeId, suspicion: u64, now_ms: u64) -> Unanswered {
        let mut voter = self.pulse.voter();
        let electorate = self.electorate().since;
        voter.votes_since(now_ms, electorate);
        // What it says must hold after a restart too: with an older state it would answer the node again.
        let standing = standing(&self.replica.state(), node).filter(|_| self.replica.stored() >= suspicion);
        Unanswered { for_ms: voter.unanswered_ms(now_ms, node, standing, suspicion), electorate }
    }

    /// Sends a heartbeat of this node to a voter.
    ///
    /// # Errors
    /// It does not reply in time.
    pub async fn beat(&self, voter: NodeId, connected: bool) -> io::Result<Reply> {
        let beaten = if voter == self.node {
            self.heartbeat_of(voter, connected, self.clock.boottime_ms())
        } else {
            self.ask_member::<Beaten>(voter, &Question::Beat { connected }, ANSWER_MAX).await?
        };
        let Beaten { answered, revision, electorate } = beaten;
        Ok(Reply { voter, answered, revision, electorate })
    }

    /// Asks a voter for how long it has not answered a node.
    ///
    /// # Errors
    /// It does not answer in time.
    pub async fn ask_unanswered(
        &self,
        voter: NodeId,
        node: NodeId,
        suspicion: u64,
    ) -> io::Result<Unanswered> {
        if voter == self.node {
            return Ok(self.unanswered(node, suspicion, self.clock.boottime_ms()));
        }
        self.ask_member(voter, &Question::Unanswered { node, suspicion }, ANSWER_MAX).await
    }

    /// Whether `node` can be reached from here and says that a majority of the voters replies to it.
    pub async fn reaches(&self, node: NodeId) -> bool {
        self.ask_member(node, &Question::Connected, REACH_MAX).await.unwrap_or(false)
    }

    /// Asks `via` whether it reaches `node`.
    pub async fn reaches_via(&self, via: NodeId, node: NodeId) -> bool {
        if via == self.node {
            return self.reaches(node).await;
        }
        self.ask_member(via, &Question::Reach(node), ANSWER_MAX).await.unwrap_or(false)
    }

    /// Asks another member.
    pub(super) async fn ask_member<T: DeserializeOwned>(
        &self,
        node: NodeId,
        question: &Question,
        time: Duration,
    ) -> io::Result<T> {
        let known =
            self.raft.metrics().borrow_watched().membership_config.membership().get_node(&node).cloned();
        let caller = self.peers.caller(node, known.as_ref().map(|node| node.addr.as_str()));
        caller.ask(question, time).await
    }
}
