//! Who is a member, and who of them votes. The state says which nodes there are; the leader makes the membership of Raft
//! follow: a new node becomes a learner, learners that have caught up become voters, a removed node leaves.
//!
//! Level-triggered: each look compares what is with what shall be and does one step, so a new leader goes on where the old one
//! stopped.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use openraft::type_config::async_runtime::watch::WatchReceiver;
use openraft::{BasicNode, ChangeMembers, Instant, RaftMetrics};
use tokio_util::sync::CancellationToken;

use super::Consensus;
use super::peer::call::Question;
use super::propose::no_leader;
use super::types::Types;
use crate::state::{NodeId, NodeRecord, State};

/// Most voters: more cost speed and gain nothing, since two of five may fail at once.
pub const VOTERS_MAX: usize = 5;
/// A learner has caught up when this many entries or fewer are missing.
const LAG_MAX: u64 = 500;
/// Time between two looks when nothing calls for one.
const LOOK: Duration = Duration::from_millis(500);

/// A voter that has not answered for so long is not asked to lead.
const SILENCE_MAX_MS: u64 = 2_000;
/// Longest wait of a leader that gives up until another one leads.
pub const GIVE_UP_MAX: Duration = Duration::from_secs(5);
/// Pause before a leader is looked for again that gave another answer than was hoped for.
const PAUSE: Duration = Duration::from_millis(50);

/// A step toward the membership that shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// These nodes become learners.
    Add(BTreeSet<NodeId>),
    /// These vote from now on, the other voters become learners.
    Vote(BTreeSet<NodeId>),
    /// This voter leads from now on, since the leader shall not vote. It would lead on as a learner, to whom nobody says that he
    /// is alive.
    HandOver(NodeId),
    /// These leave.
    Remove(BTreeSet<NodeId>),
    /// This node is reached here. A leader that has just started knows it only from what the log says of the members: the
    /// state, which says it too, may not be applied so far before others have been reached.
    Address(NodeId, SocketAddr),
}

/// Members as they are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Members {
    /// The one that asks, as the leader.
    pub leader: NodeId,
    /// Those that vote.
    pub voters: BTreeSet<NodeId>,
    /// All of them.
    pub all: BTreeSet<NodeId>,
    /// Learners and voters that lack few entries.
    pub caught_up: BTreeSet<NodeId>,
    /// Where they are reached.
    pub addresses: BTreeMap<NodeId, String>,
}

/// Pure: the next step, if one is needed.
pub fn next_step(state: &State, members: &Members) -> Option<Step> {
    // A state without a cluster is one that has not been made yet.
    state.cluster()?;
    let nodes: BTreeMap<NodeId, &NodeRecord> = state.nodes().map(|node| (node.id, node.as_ref())).collect();
    let new: BTreeSet<NodeId> = nodes.keys().copied().filter(|node| !members.all.contains(node)).collect();
    if !new.is_empty() {
        return Some(Step::Add(new));
    }
    let wanted = voters(&nodes, members);
    let change = !wanted.is_empty() && wanted != members.voters;
    let stays = |voters: &BTreeSet<NodeId>| voters.contains(&members.leader);
    if !stays(&members.voters) || (change && !stays(&wanted)) {
        let next = wanted.intersection(&members.voters).filter(|node| members.caught_up.contains(node));
        if let Some(next) = next.copied().find(|node| *node != members.leader) {
            return Some(Step::HandOver(next));
        }
    }
    if change {
        return Some(Step::Vote(wanted));
    }
    let gone: BTreeSet<NodeId> =
        members.all.iter().filter(|node| !nodes.contains_key(node)).copied().collect();
    if !gone.is_empty() {
        return Some(Step::Remove(gone));
    }
    let moved = nodes.values().filter_map(|node| Some((node.id, node.address?)));
    let known = |(node, address): &(NodeId, SocketAddr)| {
        members.addresses.get(node).is_none_or(|known| *known == address.to_string())
    };
    moved.filter(|moved| !known(moved)).map(|(node, address)| Step::Address(node, address)).next()
}

/// An odd number of voters, at most five, spread over zones and then racks. Voters stay voters unless there is a reason: one
/// was removed, there are too many, or a caught-up learner stands in a zone that has fewer voters by two.
fn voters(nodes: &BTreeMap<NodeId, &NodeRecord>, members: &Members) -> BTreeSet<NodeId> {
    let able = |id: &NodeId| members.voters.contains(id) || members.caught_up.contains(id);
    let mut candidates: Vec<NodeId> = nodes.keys().copied().filter(able).collect();
    let wanted = match candidates.len().min(VOTERS_MAX) {
        0 => return BTreeSet::new(),
        even if even.is_multiple_of(2) => even.saturating_sub(1),
        odd => odd,
    };
    let mut chosen = BTreeSet::new();
    while chosen.len() < wanted {
        let load = |id: NodeId, label: &str| {
            let place = |id: NodeId| nodes.get(&id).and_then(|node| node.labels.get(label));
            chosen.iter().filter(|other| place(**other) == place(id)).count()
        };
        let best = candidates.iter().copied().min_by_key(|id| {
            // Whoever votes already is preferred among equals, then the older node.
            (load(*id, "zone"), load(*id, "rack"), !members.voters.contains(id), *id)
        });
        let Some(best) = best else { break };
        candidates.retain(|id| *id != best);
        chosen.insert(best);
    }
    chosen
}

fn members(metrics: &RaftMetrics<Types>) -> Members {
    let membership = metrics.membership_config.membership();
    let last = metrics.last_log_index.unwrap_or(0);
    let near = |index: u64| last.saturating_sub(index) <= LAG_MAX;
    let replication = metrics.replication.iter().flatten();
    let caught_up = replication
        .filter_map(|(node, matched)| matched.as_ref().is_some_and(|id| near(id.index)).then_some(*node));
    Members {
        leader: metrics.id,
        voters: membership.voter_ids().collect(),
        all: membership.nodes().map(|(node, _)| *node).collect(),
        caught_up: caught_up.chain([metrics.id]).collect(),
        addresses: membership.nodes().map(|(id, node)| (*id, node.addr.clone())).collect(),
    }
}

impl Consensus {
    /// While this member leads, makes the membership follow the state. Runs until `stop`.
    pub async fn keep_members(self, stop: CancellationToken) {
        let mut revisions = self.replica.revisions();
        loop {
            let woken = async {
                tokio::select! {
                    biased;
                    changed = revisions.changed() => changed.is_ok(),
                    () = tokio::time::sleep(LOOK) => true,
                }
            };
            match stop.run_until_cancelled(woken).await {
                Some(true) => {}
                Some(false) | None => return,
            }
            if !self.leads() {
                self.raft.runtime_config().tick(true);
                continue;
            }
            let present = members(&self.raft.metrics().borrow_watched());
            let step = next_step(&self.replica.state(), &present);
            // A member that is alone has nobody to be heard by, or to be outvoted by: its clock of elections and heartbeats, which wakes
            // the process 66 times a second, stands still.
            self.raft.runtime_config().tick(present.all.len() > 1 || step.is_some());
            let Some(step) = step else { continue };
            tracing::info!(?step, "the membership changes");
            let result = match step {
                Step::Add(nodes) => {
                    let added = self.addresses_of(nodes);
                    self.raft.change_membership(ChangeMembers::AddNodes(added), true).await.map(drop)
                }
                Step::Vote(voters) => {
                    self.raft.change_membership(ChangeMembers::ReplaceAllVoters(voters), true).await.map(drop)
                }
                Step::Address(node, address) => {
                    let moved = BTreeMap::from([(node, BasicNode { addr: address.to_string() })]);
                    self.raft.change_membership(ChangeMembers::SetNodes(moved), false).await.map(drop)
                }
                Step::Remove(nodes) => {
                    self.raft.change_membership(ChangeMembers::RemoveNodes(nodes), false).await.map(drop)
                }
                Step::HandOver(next) => {
                    let given = stop.run_until_cancelled(self.give_up(next, GIVE_UP_MAX)).await;
                    if let Some(Err(reason)) = given {
                        tracing::warn!("leadership was not handed over: {reason}");
                    }
                    continue;
                }
            };
            if let Err(error) = result {
                tracing::warn!("the membership cannot be changed now: {error}");
                // The next look decides anew.
                stop.run_until_cancelled(tokio::time::sleep(LOOK)).await;
            }
        }
    }

    fn addresses_of(&self, nodes: BTreeSet<NodeId>) -> BTreeMap<NodeId, BasicNode> {
        let state = self.replica.state();
        let address = |node| state.node(node).and_then(|record| record.address);
        let known = |node| BasicNode { addr: address(node).map(|a| a.to_string()).unwrap_or_default() };
        nodes.into_iter().map(|node| (node, known(node))).collect()
    }

    /// Makes another voter lead; asks the leader when that is another member. While a leader gives up, any voter may stand for
    /// election: when another one wins than was meant, it is asked in turn.
    ///
    /// # Errors
    /// A sentence when it cannot be, or was not within `time`.
    pub async fn transfer(&self, to: NodeId, time: Duration) -> Result<(), String> {
        let deadline = tokio::time::Instant::now() + time;
        let mut reason = no_leader(None);
        loop {
            let leader = self.leader_id();
            if leader == Some(to) {
                return Ok(());
            }
            if tokio::time::Instant::now() >= deadline {
                return Err(reason);
            }
            self.check_voter(to)?;
            let step = async {
                match leader {
                    Some(leader) if leader == self.node => self.give_up(to, time).await,
                    Some(leader) => {
                        let answer: Result<Option<String>, _> =
                            self.ask_member(leader, &Question::GiveUp(to), time).await;
                        answer
                            .map_err(|error| format!("{} leads: {error}", self.name_of(leader)))?
                            .map_or(Ok(()), Err)
                    }
                    None => Ok(()),
                }?;
                self.leader_is_other_than(leader, time).await
            };
            match tokio::time::timeout_at(deadline, step).await {
                Ok(Ok(())) => {
                    if let Some(other) = self.leader_id().filter(|other| *other != to) {
                        reason = format!("{} was elected instead", self.name_of(other));
                    }
                }
                // The next look decides anew: the leader may be another by now.
                Ok(Err(error)) => {
                    reason = error;
                    tokio::time::sleep(PAUSE).await;
                }
                Err(_) => return Err(reason),
            }
        }
    }

    /// As the leader: asks another voter to stand for election at once, and waits until another member leads.
    ///
    /// # Errors
    /// When this member does not lead, that one does not vote or answer, or no other was elected within `time`.
    pub async fn give_up(&self, to: NodeId, time: Duration) -> Result<(), String> {
        if !self.leads() {
            return Err(format!("{} does not lead", self.name_of(self.node)));
        }
        self.check_voter(to)?;
        // Otherwise the others would elect one of them, and writes wait for nothing.
        let heard = self.standing().1.get(&to).copied();
        if heard.is_none_or(|ms| ms > SILENCE_MAX_MS) {
            return Err(format!("{} does not answer", self.name_of(to)));
        }
        self.raft.trigger().transfer_leader(to).await.map_err(|error| error.to_string())?;
        self.leader_is_other_than(Some(self.node), time).await
    }

    fn check_voter(&self, node: NodeId) -> Result<(), String> {
        let votes = self.raft.voter_ids().any(|voter| voter == node);
        votes.then_some(()).ok_or_else(|| format!("{} does not vote", self.name_of(node)))
    }

    /// Waits until somebody leads, and not this one.
    async fn leader_is_other_than(&self, node: Option<NodeId>, time: Duration) -> Result<(), String> {
        let other =
            |metrics: &RaftMetrics<Types>| metrics.current_leader.is_some() && metrics.current_leader != node;
        let wait = self.raft.wait(Some(time)).metrics(other, "another leads").await;
        wait.map(drop).map_err(|_| "no other voter has been elected".to_owned())
    }

    /// Which members vote, and the milliseconds since each answered the leader, as far as this member knows.
    pub fn standing(&self) -> (BTreeSet<NodeId>, BTreeMap<NodeId, u64>) {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let heard = metrics.heartbeat.iter().flatten().filter_map(|(node, at)| {
            let age = at.as_ref()?.elapsed();
            Some((*node, u64::try_from(age.as_millis()).unwrap_or(u64::MAX)))
        });
        (metrics.membership_config.membership().voter_ids().collect(), heard.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::member::{JoinTokenRecord, MemberCommand, NodeFacts};
    use crate::state::testing::Cluster;
    use crate::state::{Command, Proposal};

    /// A state with nodes 1.. in these zones.
    fn state(zones: &[&str]) -> State {
        let mut cluster = Cluster::new(16);
        for (n, zone) in zones.iter().enumerate() {
            let facts = NodeFacts {
                name: format!("n{n}"),
                address: None,
                public_key: Some(format!("k{n}")),
                labels: [("zone".to_owned(), (*zone).to_owned())].into(),
                version: String::new(),
                feature_level: crate::node::feature_level(),
                trust_version: 1,
            };
            let command = if n == 0 {
                MemberCommand::Announce { node: 1, facts: Box::new(facts) }
            } else {
                let token =
                    JoinTokenRecord { sha256: format!("t{n}"), created_at_ms: 0, expires_at_ms: u64::MAX };
                cluster.run(Command::Member(Box::new(MemberCommand::PutJoinToken(token)))).unwrap();
                MemberCommand::Join { token: format!("t{n}"), facts: Box::new(facts) }
            };
            cluster.run(Command::Member(Box::new(command))).unwrap();
        }
        cluster.state
    }

    fn members(voters: &[NodeId], all: &[NodeId], caught_up: &[NodeId]) -> Members {
        let set = |ids: &[NodeId]| ids.iter().copied().collect();
        let leader = voters.first().copied().unwrap_or_default();
        Members {
            leader,
            voters: set(voters),
            all: set(all),
            caught_up: set(caught_up),
            ..Members::default()
        }
    }

    #[test]
    fn a_new_node_learns_first_and_votes_when_it_has_caught_up_and_the_number_is_odd() {
        let state = state(&["a", "b", "c"]);
        let new = next_step(&state, &members(&[1], &[1], &[1]));
        assert_eq!(new, Some(Step::Add([2, 3].into())), "all at once");
        assert_eq!(next_step(&state, &members(&[1], &[1, 2, 3], &[1])), None);
        assert_eq!(next_step(&state, &members(&[1], &[1, 2, 3], &[1, 2])), None, "two voters are no better");
        let three = Some(Step::Vote([1, 2, 3].into()));
        assert_eq!(next_step(&state, &members(&[1], &[1, 2, 3], &[1, 2, 3])), three);
        assert_eq!(
            next_step(&state, &members(&[1, 2, 3], &[1, 2, 3], &[1])),
            None,
            "a silent voter stays one"
        );
    }

    #[test]
    fn a_leader_that_shall_not_vote_hands_over_first_and_one_that_does_not_vote_hands_over() {
        let mut state = state(&["a", "b", "c", "d"]);
        let command = Command::Member(Box::new(MemberCommand::Remove { node: 1 }));
        let removed = Proposal { now_ms: 0, key: None, command };
        state.apply(state.revision() + 1, &removed).unwrap();
        let all = [1, 2, 3, 4];
        let mut present = members(&[1, 2, 3], &all, &[1, 3, 4]);
        assert_eq!(next_step(&state, &present), Some(Step::HandOver(3)), "2 lacks entries");
        present.leader = 3;
        assert_eq!(next_step(&state, &present), Some(Step::Vote([2, 3, 4].into())));
        let mut present = members(&[2, 3, 4], &all, &[1, 3, 4]);
        present.leader = 1;
        assert_eq!(next_step(&state, &present), Some(Step::HandOver(3)));
        present.leader = 3;
        assert_eq!(next_step(&state, &present), Some(Step::Remove([1].into())));
        let alone = members(&[1], &all, &[1, 3]);
        assert_eq!(next_step(&state, &alone), Some(Step::Vote([3].into())), "nobody else votes yet");
    }

    #[test]
    fn voters_stand_in_as_many_zones_as_there_are() {
        let state = state(&["a", "a", "a", "b", "c", "b", "c"]);
        let all: Vec<NodeId> = (1..=7).collect();
        let step = next_step(&state, &members(&[1, 2, 3], &all, &all));
        assert_eq!(step, Some(Step::Vote([1, 2, 4, 5, 6].into())));
        assert_eq!(next_step(&state, &members(&[1, 2, 4, 5, 6], &all, &all)), None, "and stay there");
    }

    #[test]
    fn a_node_is_entered_where_it_says_that_it_is() {
        let mut state = state(&["a"]);
        let mut facts = state.node(1).unwrap().facts();
        facts.address = Some("10.0.0.1:7000".parse().unwrap());
        let command = MemberCommand::Announce { node: 1, facts: Box::new(facts) };
        let command = Command::Member(Box::new(command));
        state.apply(99, &crate::state::Proposal { now_ms: 1, key: None, command }).unwrap();
        let mut present = members(&[1], &[1], &[1]);
        present.addresses.insert(1, "localhost".into());
        assert_eq!(next_step(&state, &present), Some(Step::Address(1, "10.0.0.1:7000".parse().unwrap())));
        present.addresses.insert(1, "10.0.0.1:7000".into());
        assert_eq!(next_step(&state, &present), None);
    }

    #[test]
    fn a_removed_node_stops_voting_before_it_leaves() {
        let state = state(&["a", "b", "c"]);
        let present = members(&[1, 2, 9], &[1, 2, 3, 9], &[1, 2, 3]);
        assert_eq!(next_step(&state, &present), Some(Step::Vote([1, 2, 3].into())));
        let present = members(&[1, 2, 3], &[1, 2, 3, 9], &[1, 2, 3]);
        assert_eq!(next_step(&state, &present), Some(Step::Remove([9].into())));
    }
}
