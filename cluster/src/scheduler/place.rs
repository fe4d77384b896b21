//! `place(view, request)`: filters, scores, and the search for the best node in order of fullness.

use std::cmp::Reverse;

use blixard_api::placement::{Scope, Strategy, TaintEffect};

use super::model::{Data, Decision, Explanation, Reason, Request};
use super::preempt;
use super::view::{FULL, Neighbours, NodeState, View};
use crate::state::NodeId;

/// What each score counts; each score is 0 to 1000 before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Weights {
    /// Fullness (pack) or emptiness (spread); at least 1.
    pub fill: i64,
    /// The image is there.
    pub image: i64,
    /// Cost: the dearest node gets 0.
    pub cost: i64,
    /// Nearness to the data.
    pub data: i64,
    /// Taken off for each member of a group that is nearer than preferred (10 members at most count).
    pub crowd: i64,
    /// Taken off for each taint that only prefers others.
    pub taint: i64,
}

impl Weights {
    /// As nodes use them.
    pub const DEFAULT: Self = Self { fill: 4, image: 2, cost: 2, data: 4, crowd: 8, taint: 8 };
}

/// A score of 1 before its weight.
const ONE: i64 = 1000;

/// Where the request goes. The same view and request give the same answer: among equal scores the lowest number wins.
pub fn place(view: &View, request: &Request<'_>) -> Decision {
    let weights = Weights::DEFAULT;
    let search = Search::new(view, request, weights);
    if let Some(node) = search.best() {
        return Decision::Place { node, victims: Vec::new() };
    }
    match preempt::place(view, request, &search) {
        Some((node, victims)) => Decision::Place { node, victims },
        None => Decision::Refused(explain(view, request)),
    }
}

/// Looks at every node and says how many are possible, and how many each constraint refuses.
pub fn explain(view: &View, request: &Request<'_>) -> Explanation {
    let search = Search::new(view, request, Weights::DEFAULT);
    let mut explanation = Explanation { nodes: view.node_count(), ..Explanation::default() };
    for node in view.nodes() {
        match search.refuses(node) {
            Some(reason) => *explanation.refused.entry(reason).or_default() += 1,
            None => explanation.possible += 1,
        }
    }
    explanation
}

/// Why this node is not possible, if it is not.
pub fn refuses(view: &View, request: &Request<'_>, node: NodeId) -> Option<Reason> {
    let search = Search::new(view, request, Weights::DEFAULT);
    view.node(node).map_or(Some(Reason::Down), |node| search.refuses(node))
}

/// One request on one view.
pub(super) struct Search<'a> {
    view: &'a View,
    request: &'a Request<'a>,
    weights: Weights,
    neighbours: Neighbours<'a>,
    /// Failure domains of the nodes near which the data lies.
    near: Vec<[u32; 4]>,
    least_cost: u32,
    most_cost: u32,
}

/// What is the same for all nodes of a class.
#[derive(Clone, Copy)]
struct ClassVerdict {
    refused: Option<Reason>,
    /// Score of cost and taints.
    score: i64,
}

impl<'a> Search<'a> {
    pub(super) fn new(view: &'a View, request: &'a Request<'a>, weights: Weights) -> Self {
        let near = match request.data {
            Data::Near(nodes) => {
                nodes.iter().filter_map(|node| view.node(*node)).map(|node| node.domains).collect()
            }
            _ => Vec::new(),
        };
        let (least_cost, most_cost) = view.costs();
        let neighbours = view.neighbours(request);
        Self { view, request, weights, neighbours, near, least_cost, most_cost }
    }

    /// The first constraint that refuses this node.
    pub(super) fn refuses(&self, node: &NodeState) -> Option<Reason> {
        if !node.info.up {
            return Some(Reason::Down);
        }
        if node.info.cordoned {
            return Some(Reason::Cordoned);
        }
        if self.request.avoid.contains(&node.info.id) {
            return Some(Reason::Avoided);
        }
        self.class_refuses(node).or_else(|| self.own_refuses(node)).or_else(|| self.full(node))
    }

    /// Constraints that are the same for all nodes of a class, except those on the name.
    fn class_refuses(&self, node: &NodeState) -> Option<Reason> {
        let placement = self.request.placement;
        if placement.arch != node.info.arch {
            return Some(Reason::Arch);
        }
        let broken = placement.constraints.iter().position(|c| !c.holds(node.info.label(&c.key)));
        if let Some(number) = broken {
            return Some(Reason::Constraint(number));
        }
        let bad = |taint: &&blixard_api::placement::Taint| {
            taint.effect == TaintEffect::NoSchedule
                && !placement.tolerations.iter().any(|toleration| toleration.covers(taint))
        };
        node.info.taints.iter().find(bad).map(|_| Reason::Taint)
    }

    /// Constraints that differ from node to node, but for room.
    fn own_refuses(&self, node: &NodeState) -> Option<Reason> {
        if matches!(self.request.data, Data::Only(nodes) if !nodes.contains(&node.info.id)) {
            return Some(Reason::Data);
        }
        self.neighbours.forbid(node.domains).then_some(Reason::AntiAffinity)
    }

    fn full(&self, node: &NodeState) -> Option<Reason> {
        if !node.has_accelerators(&self.request.placement.accelerators) {
            return Some(Reason::Accelerators);
        }
        if node.info.room.is_none() && !self.request.untold {
            return Some(Reason::Untold);
        }
        node.short_of(self.request.size, super::model::Size::default()).map(Reason::Room)
    }

    /// True when only what other VMs take stands in the way.
    pub(super) fn refused_by_others(&self, node: &NodeState) -> bool {
        matches!(self.refuses(node), Some(Reason::Accelerators | Reason::Room(_)))
    }

    fn class_score(&self, node: &NodeState) -> i64 {
        let tolerations = &self.request.placement.tolerations;
        let mild = |taint: &&blixard_api::placement::Taint| {
            taint.effect == TaintEffect::PreferNoSchedule && !tolerations.iter().any(|t| t.covers(taint))
        };
        let taints = i64::try_from(node.info.taints.iter().filter(mild).count()).unwrap_or(i64::MAX).min(10);
        self.cost_score(node.info.cost) - taints * ONE * self.weights.taint
    }

    fn cost_score(&self, cost: u32) -> i64 {
        let dearer = i64::from(self.most_cost.saturating_sub(cost));
        (dearer * ONE).checked_div(i64::from(self.most_cost)).unwrap_or(ONE) * self.weights.cost
    }

    fn fill_score(&self, fullness: u16) -> i64 {
        let fill = match self.request.placement.strategy {
            Strategy::Pack => i64::from(fullness),
            Strategy::Spread => i64::from(FULL.saturating_sub(fullness)),
        };
        fill * self.weights.fill
    }

    fn own_score(&self, node: &NodeState) -> i64 {
        let image = self.request.image.is_some_and(|image| node.info.images.contains(&image));
        let crowd = i64::from(self.neighbours.crowd(node.domains).min(10));
        i64::from(image) * ONE * self.weights.image + self.data_score(node) * self.weights.data
            - crowd * ONE * self.weights.crowd
    }

    fn data_score(&self, node: &NodeState) -> i64 {
        let nearness = |scope: Scope| match scope {
            Scope::Node => ONE,
            Scope::Rack => 600,
            Scope::Zone => 300,
            Scope::Datacenter => 100,
        };
        let same = |near: &[u32; 4]| {
            let pairs = Scope::ALL.into_iter().zip(near).zip(&node.domains);
            pairs.filter(|((_, a), b)| a == b).map(|((scope, _), _)| nearness(scope)).max().unwrap_or(0)
        };
        self.near.iter().map(same).max().unwrap_or(0)
    }

    /// The score of a node that is possible.
    #[cfg(test)]
    pub(super) fn score(&self, node: &NodeState) -> i64 {
        self.fill_score(node.fullness()) + self.class_score(node) + self.own_score(node)
    }

    /// What scores other than fullness can come to at most.
    fn other_scores_max(&self) -> i64 {
        let image = if self.request.image.is_some() { ONE * self.weights.image } else { 0 };
        let data = if self.near.is_empty() { 0 } else { ONE * self.weights.data };
        self.cost_score(self.least_cost) + image + data
    }

    /// A node that is fuller than this has no room for the request.
    fn fullest_possible(&self) -> u16 {
        // Exact for the largest node, an upper bound for all others.
        let size = self.request.size;
        let largest = self.view.largest();
        let left = |size: u64, all: u64| {
            let share = u128::from(all.saturating_sub(size)) * u128::from(FULL);
            share.checked_div(u128::from(all)).and_then(|share| u16::try_from(share).ok()).unwrap_or(FULL)
        };
        left(size.memory_mib, largest.memory_mib).max(left(size.cpu_milli, largest.cpu_milli))
    }

    /// The best node that is possible. Nodes are visited from the best fullness on; the search ends when no later one can
    /// be better.
    fn best(&self) -> Option<NodeId> {
        let range = self.view.by_fullness(self.fullest_possible());
        match self.request.placement.strategy {
            Strategy::Spread => self.best_of(range),
            Strategy::Pack => self.best_of(range.rev()),
        }
    }

    fn best_of<'v>(
        &self,
        nodes: impl Iterator<Item = (u16, &'v std::sync::Arc<NodeState>)>,
    ) -> Option<NodeId> {
        let most = self.other_scores_max();
        let by_name = self.request.placement.constraints.iter().any(|c| c.key == Scope::Node.name());
        let mut verdicts: Vec<Option<ClassVerdict>> = vec![None; self.view.class_count()];
        let mut best: Option<(i64, Reverse<NodeId>)> = None;
        for (fullness, node) in nodes {
            let fill = self.fill_score(fullness);
            // Equal fullness may still win by its number, less cannot win at all.
            if best.is_some_and(|(score, _)| fill + most < score) {
                break;
            }
            if best.is_some_and(|best| best > (fill + most, Reverse(node.info.id))) {
                continue;
            }
            if self.full(node).is_some() || self.request.avoid.contains(&node.info.id) {
                continue;
            }
            let judge = || ClassVerdict { refused: self.class_refuses(node), score: self.class_score(node) };
            let slot = usize::try_from(node.class()).ok().and_then(|class| verdicts.get_mut(class));
            let verdict = match slot {
                Some(slot) if !by_name => *slot.get_or_insert_with(judge),
                _ => judge(),
            };
            if verdict.refused.is_some() || self.own_refuses(node).is_some() {
                continue;
            }
            let score = fill + verdict.score + self.own_score(node);
            best = best.max(Some((score, Reverse(node.info.id))));
        }
        best.map(|(_, Reverse(node))| node)
    }
}

#[cfg(test)]
#[path = "place_test.rs"]
mod tests;
