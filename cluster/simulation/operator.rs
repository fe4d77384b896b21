//! An operator, who adds, cordons, drains and removes nodes while things go wrong, and does not always learn what became of it.

use std::time::Duration;

use axum::http::Method;
use blixard_node::state::{NodeId, State};
use serde_json::json;
use tokio::time::Instant;

use crate::dice::Dice;
use crate::member::{Ask, Became};
use crate::world::World;

/// Most nodes that are not removed.
const NODES_MAX: usize = 6;
/// As many have to stay, and to take VMs: all VMs of the clients have room on two.
const NODES_MIN: usize = 3;
/// Longest wait for an answer.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// What an operator does.
#[derive(Debug, Clone, Copy)]
enum Action {
    Add,
    Cordon(NodeId),
    Drain(NodeId),
    Uncordon(NodeId),
    Remove(NodeId),
}

/// The operator of one run.
pub struct Operator {
    dice: Dice,
    per_mille: u64,
    /// Removed nodes whose processes are to be ended.
    leaving: Vec<(Instant, NodeId)>,
}

impl Operator {
    /// One who is busy or has nothing to do, as the seed says. Its numbers are its own.
    pub fn new(seed: u64) -> Self {
        let mut dice = Dice::new(seed ^ 0x6f70_6572_6174_6f72);
        let per_mille = dice.pick(&[0, 60, 200]).unwrap_or(60);
        Self { dice, per_mille, leaving: Vec::new() }
    }

    /// Perhaps does something.
    pub async fn act(&mut self, world: &mut World) {
        let Some(state) = self.follow(world).await else { return };
        if !self.dice.chance(self.per_mille) {
            return;
        }
        let Some(action) = self.choose(&state) else { return };
        world.trace.note(format_args!("operator: {action:?}"));
        self.take(world, &state, action).await;
    }

    /// Undoes what keeps nodes from their work; answers whether nothing is left to be undone. To be called until then.
    pub async fn tidy(&mut self, world: &mut World) -> bool {
        self.leaving.iter_mut().for_each(|(at, _)| *at = Instant::now());
        let Some(state) = self.follow(world).await else { return false };
        let kept = state.nodes().find(|node| node.cordoned || node.offer.drain_grace_ms.is_some());
        if let Some(node) = kept {
            self.take(world, &state, Action::Uncordon(node.id)).await;
        }
        kept.is_none() && self.leaving.is_empty()
    }

    /// Takes note of who is a member, by the newest state that a node has: one that was removed is ended after a while, and one that was
    /// added starts, also when that was not answered.
    async fn follow(&mut self, world: &mut World) -> Option<State> {
        let nodes = world.running.all().into_iter().map(|member| member.consensus);
        let newest = nodes.max_by_key(|node| node.replica().state().revision())?;
        let state = newest.replica().state().clone();
        for (node, place) in &mut world.places {
            if !place.removed && place.since <= state.revision() && state.node(*node).is_none() {
                place.removed = true;
                world.trace.note(format_args!("{node} is removed"));
                self.leaving.push((Instant::now() + self.dice.millis(0..=5_000), *node));
            }
        }
        let due = |(at, _): &(Instant, NodeId)| *at <= Instant::now();
        for (_, node) in self.leaving.extract_if(.., |leaving| due(leaving)) {
            world.kill(node, false, Duration::ZERO);
        }
        let new: Vec<NodeId> =
            state.nodes().map(|node| node.id).filter(|node| !world.places.contains_key(node)).collect();
        for node in new {
            world.add_place(node, state.revision());
            world.start(node, false).await;
        }
        Some(state)
    }

    fn choose(&mut self, state: &State) -> Option<Action> {
        let all: Vec<NodeId> = state.nodes().map(|node| node.id).collect();
        let resting: Vec<NodeId> = state.nodes().filter(|node| node.cordoned).map(|node| node.id).collect();
        let draining: Vec<NodeId> =
            state.nodes().filter(|node| node.offer.drain_grace_ms.is_some()).map(|node| node.id).collect();
        let spare = all.len().saturating_sub(resting.len()) > NODES_MIN;
        match self.dice.within(0..=9) {
            0..=2 if all.len() < NODES_MAX => Some(Action::Add),
            3..=4 if spare => self.dice.pick(&all).map(Action::Drain),
            5 if spare => self.dice.pick(&all).map(Action::Cordon),
            6 => self.dice.pick(&resting).map(Action::Uncordon),
            7..=9 if all.len() > NODES_MIN => self.dice.pick(&draining).map(Action::Remove),
            _ => None,
        }
    }

    async fn take(&mut self, world: &mut World, state: &State, action: Action) {
        let (method, node, verb, body) = match action {
            Action::Add => {
                let added = tokio::time::timeout(ANSWER_MAX, world.admit()).await;
                if let Ok(Ok(node)) = added {
                    world.start(node, false).await;
                }
                return;
            }
            Action::Cordon(node) => (Method::POST, node, ":cordon", None),
            Action::Uncordon(node) => (Method::POST, node, ":uncordon", None),
            Action::Remove(node) => (Method::DELETE, node, "", None),
            Action::Drain(node) => {
                let grace_ms = self.dice.pick(&[0, 300, 2_000]).unwrap_or(0);
                (Method::POST, node, ":drain", Some(json!({ "grace_ms": grace_ms })))
            }
        };
        let Some((record, some)) = state.node(node).zip(world.some()) else { return };
        let ask = Ask { body, ..Ask::new(method, format!("/v1/nodes/{}{verb}", record.name)) };
        let answer = match tokio::time::timeout(ANSWER_MAX, some.ask(ask, &world.trace)).await {
            Ok(Became::Answered(status, _)) => status.to_string(),
            other => format!("{other:?}"),
        };
        world.trace.note(format_args!("operator: {action:?}: {answer}"));
    }
}
