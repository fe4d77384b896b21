//! The leader's part: who is silent, who is suspected, whose lease has ended.

use std::collections::{BTreeMap, BTreeSet};

use super::{Electorate, EntryId, Settings, Standing, Voter};
use crate::state::{NodeId, NodeStatus};

/// What the leader does next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Asks these nodes to reach that one.
    Probe {
        /// Who is silent.
        node: NodeId,
        /// Who tries.
        via: Vec<NodeId>,
    },
    /// Proposes [`NodeChange::Suspect`](crate::state::placement::NodeChange::Suspect).
    Suspect(NodeId),
    /// Asks these voters for how long they have not answered this node ([`Voter::unanswered_ms`]).
    Ask {
        /// Who is suspected.
        node: NodeId,
        /// Revision of the suspicion.
        suspicion: u64,
        /// Who has not said yet.
        voters: BTreeSet<NodeId>,
    },
    /// Proposes [`NodeChange::Down`](crate::state::placement::NodeChange::Down).
    Down {
        /// Whose lease has ended.
        node: NodeId,
        /// Revision of the suspicion.
        suspicion: u64,
    },
    /// Proposes [`NodeChange::Clear`](crate::state::placement::NodeChange::Clear).
    Clear(NodeId),
}

/// A voter's answer to [`Action::Ask`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Unanswered {
    /// For how long it had not answered the node.
    pub for_ms: u64,
    /// When this came, on the leader's clock: the time on the way only makes it longer.
    pub at_ms: u64,
    /// The entry by which it knew who votes.
    pub electorate: EntryId,
}

/// True when the lease of a node has ended whatever the voters do that did not answer.
pub fn lease_is_over(
    now_ms: u64,
    told: &BTreeMap<NodeId, Unanswered>,
    voters: &Electorate,
    settings: &Settings,
) -> bool {
    voters.is_majority(|voter| {
        told.get(&voter).is_some_and(|told| {
            let for_ms = told.for_ms.saturating_add(now_ms.saturating_sub(told.at_ms));
            told.electorate == voters.since && for_ms >= settings.lease_over_ms()
        })
    })
}

#[derive(Debug, Clone, Default)]
struct Watched {
    probed_ms: Option<u64>,
    reached_ms: Option<u64>,
    /// Revision of the suspicion that the answers are about.
    suspicion: u64,
    told: BTreeMap<NodeId, Unanswered>,
}

/// What a leader works on. Begins empty with each term: what matters is in the log and with the voters.
#[derive(Debug, Clone)]
pub struct Detector {
    settings: Settings,
    watched: BTreeMap<NodeId, Watched>,
}

impl Detector {
    /// A leader that knows nothing yet.
    pub fn new(settings: Settings) -> Self {
        Self { settings, watched: BTreeMap::new() }
    }

    /// One of those who were asked has reached the node, and heard from it that a majority replies to it.
    pub fn reached(&mut self, now_ms: u64, node: NodeId) {
        self.watched.entry(node).or_default().reached_ms = Some(now_ms);
    }

    /// A voter that has applied this suspicion said for how long it has not answered the node.
    pub fn told(&mut self, node: NodeId, suspicion: u64, voter: NodeId, told: Unanswered) {
        let known = self.watched.get_mut(&node).filter(|watched| watched.suspicion == suspicion);
        if let Some(watched) = known {
            watched.told.insert(voter, told);
        }
    }

    /// What to do now. To be called a few times per heartbeat; `own` is the leader's own part as a voter.
    pub fn tick(
        &mut self,
        now_ms: u64,
        nodes: &BTreeMap<NodeId, Standing>,
        voters: &Electorate,
        own: &Voter,
    ) -> Vec<Action> {
        self.watched.retain(|node, _| nodes.contains_key(node));
        let mut actions = Vec::new();
        let limit_ms = self.settings.suspect_after_ms;
        for (node, standing) in nodes {
            let silent = own.silent_ms(now_ms, *node) > limit_ms;
            match standing.status {
                NodeStatus::Up if silent => actions.extend(self.doubt(now_ms, *node, nodes, own)),
                NodeStatus::Up => {
                    self.watched.remove(node);
                }
                // That it is not silent for long is not enough: a voter that has just begun has heard nobody.
                _ if own.has_heard(now_ms, *node, limit_ms) => {
                    self.watched.remove(node);
                    actions.push(Action::Clear(*node));
                }
                NodeStatus::Suspected => {
                    actions.push(self.ask(now_ms, *node, standing.suspicion, voters));
                }
                NodeStatus::Down => {}
            }
        }
        actions
    }

    fn ask(&mut self, now_ms: u64, node: NodeId, suspicion: u64, voters: &Electorate) -> Action {
        let watched = self.watched.entry(node).or_default();
        if watched.suspicion != suspicion {
            *watched = Watched { suspicion, ..Watched::default() };
        }
        if lease_is_over(now_ms, &watched.told, voters, &self.settings) {
            return Action::Down { node, suspicion };
        }
        let mut left = voters.voters();
        left.retain(|voter| watched.told.get(voter).is_none_or(|told| told.electorate != voters.since));
        Action::Ask { node, suspicion, voters: left }
    }

    fn doubt(
        &mut self,
        now_ms: u64,
        node: NodeId,
        nodes: &BTreeMap<NodeId, Standing>,
        own: &Voter,
    ) -> Option<Action> {
        let settings = self.settings;
        let watched = self.watched.entry(node).or_default();
        // Only the way from here is broken: a majority hears it well. Asked again after a while.
        let reached =
            watched.reached_ms.is_some_and(|at| now_ms.saturating_sub(at) < settings.suspect_after_ms);
        match watched.probed_ms {
            _ if reached => {
                watched.probed_ms = None;
                None
            }
            None => {
                watched.probed_ms = Some(now_ms);
                let hears = |other: &NodeId| own.silent_ms(now_ms, *other) <= settings.suspect_after_ms;
                let others = nodes.iter().filter(|(other, standing)| {
                    **other != node && standing.status == NodeStatus::Up && hears(other)
                });
                // Begins behind the node, so that not always the same ones are asked.
                let (before, behind): (Vec<NodeId>, Vec<NodeId>) =
                    others.map(|(other, _)| *other).partition(|other| *other < node);
                let via = behind.into_iter().chain(before).take(settings.probes).collect();
                Some(Action::Probe { node, via })
            }
            Some(at) if now_ms.saturating_sub(at) >= settings.probe_ms => Some(Action::Suspect(node)),
            Some(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP_MS: u64 = 100;

    fn voters() -> Electorate {
        Electorate { since: (1, 1), sets: vec![BTreeSet::from([1, 2, 3])] }
    }

    fn all_up(count: u64) -> BTreeMap<NodeId, Standing> {
        (1..=count).map(|node| (node, Standing::default())).collect()
    }

    fn voter() -> Voter {
        let mut voter = Voter::new(0);
        voter.votes_since(0, (1, 1));
        voter
    }

    /// Runs a leader over a cluster whose node `dead` falls silent at once; answers when it was suspected and down.
    fn run(count: u64, dead: NodeId, new_leader_every_ms: Option<u64>) -> (u64, u64) {
        let settings = Settings::default();
        let mut nodes = all_up(count);
        let mut all: BTreeMap<NodeId, Voter> = voters().voters().iter().map(|v| (*v, voter())).collect();
        let mut detector = Detector::new(settings);
        let mut leader = 1;
        let (mut suspected, mut now) = (None, 0);
        loop {
            now += STEP_MS;
            if new_leader_every_ms.is_some_and(|every| now % every == 0) {
                detector = Detector::new(settings);
                leader = if leader == 1 { 2 } else { 1 };
            }
            for (node, standing) in nodes.iter().filter(|(node, _)| **node != dead) {
                if now % settings.heartbeat_ms == 0 {
                    all.values_mut().for_each(|voter| {
                        voter.heartbeat(now, *node, true, Some(*standing));
                    });
                }
            }
            for action in detector.tick(now, &nodes, &voters(), &all[&leader]) {
                match action {
                    Action::Probe { node, via } => {
                        assert_eq!((node, via.len()), (dead, 3.min(usize::try_from(count).unwrap() - 1)));
                    }
                    Action::Suspect(node) => {
                        assert_eq!(node, dead);
                        suspected = Some(now);
                        nodes.insert(node, Standing { status: NodeStatus::Suspected, suspicion: now });
                    }
                    Action::Ask { node, suspicion, voters } => {
                        for (number, voter) in all.iter().filter(|(number, _)| voters.contains(number)) {
                            if *number != dead {
                                let standing = nodes.get(&node).copied();
                                let for_ms = voter.unanswered_ms(now, node, standing, suspicion).unwrap();
                                let told = Unanswered { for_ms, at_ms: now, electorate: (1, 1) };
                                detector.told(node, suspicion, *number, told);
                            }
                        }
                    }
                    Action::Down { node, suspicion } => {
                        assert_eq!((node, suspicion), (dead, nodes[&dead].suspicion));
                        return (suspected.unwrap(), now);
                    }
                    Action::Clear(node) => panic!("{node} is dead"),
                }
            }
        }
    }

    #[test]
    fn a_dead_node_is_found_as_quickly_among_500_as_among_3() {
        let (suspected, down) = run(3, 3, None);
        assert!(suspected <= 3_000 && down <= 5_500, "{suspected} {down}");
        assert_eq!(run(500, 3, None), (suspected, down));
        assert_eq!(run(500, 250, None).1, down);
    }

    #[test]
    fn leaders_that_change_all_the_time_do_not_delay_it_by_a_lease() {
        let (_, down) = run(5, 5, None);
        // Each new leader asks anew: one round of probes and questions, no more.
        let (_, changing) = run(5, 5, Some(1_500));
        assert!(changing <= down + 700, "{down} {changing}");
    }

    #[test]
    fn a_node_that_others_reach_is_not_suspected_and_one_that_is_heard_again_is_cleared() {
        let mut nodes = all_up(3);
        let mut own = voter();
        let mut detector = Detector::new(Settings::default());
        let up = Some(Standing::default());
        for now in (0..20_000).step_by(100) {
            own.heartbeat(now, 1, true, up);
            own.heartbeat(now, 2, true, up);
            for action in detector.tick(now, &nodes, &voters(), &own) {
                match action {
                    Action::Probe { node: 3, .. } => detector.reached(now, 3),
                    other => panic!("{other:?}"),
                }
            }
        }
        let down = Standing { status: NodeStatus::Down, suspicion: 5 };
        nodes.insert(3, down);
        own.heartbeat(20_000, 3, true, Some(down));
        assert!(detector.tick(20_100, &nodes, &voters(), &own).contains(&Action::Clear(3)));
    }

    #[test]
    fn a_leader_whose_process_has_just_begun_takes_nobody_for_alive_whom_it_has_not_heard() {
        let mut nodes = all_up(3);
        nodes.insert(2, Standing { status: NodeStatus::Suspected, suspicion: 4 });
        nodes.insert(3, Standing { status: NodeStatus::Down, suspicion: 5 });
        let actions = Detector::new(Settings::default()).tick(100, &nodes, &voters(), &voter());
        let all = BTreeSet::from([1, 2, 3]);
        assert_eq!(actions, [Action::Ask { node: 2, suspicion: 4, voters: all }]);
    }

    #[test]
    fn what_was_said_about_one_suspicion_is_worth_nothing_after_the_next() {
        let mut nodes = all_up(3);
        let own = voter();
        let mut detector = Detector::new(Settings::default());
        let long = Unanswered { for_ms: 60_000, at_ms: 10_000, electorate: (1, 1) };
        let mut at = |detector: &mut Detector, suspicion: u64, told: Unanswered| {
            nodes.insert(3, Standing { status: NodeStatus::Suspected, suspicion });
            detector.tick(10_000, &nodes, &voters(), &own);
            (1..=2).for_each(|voter| detector.told(3, 7, voter, told));
            detector.tick(10_000, &nodes, &voters(), &own).contains(&Action::Down { node: 3, suspicion })
        };
        assert!(!at(&mut detector, 7, Unanswered { electorate: (1, 2), ..long }), "others voted then");
        assert!(at(&mut detector, 7, long));
        assert!(!at(&mut detector, 9, long), "about the one before");
    }
}
