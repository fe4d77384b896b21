//! Commands about nodes: what they offer, whether they answer, drains.

use super::State;
use super::command::{Answer, Outcome, Refusal};
use super::placement::{NodeChange, NodeOffer, NodeStatus};
use super::records::NodeId;

/// In this time, in milliseconds, no more than a third of all nodes (but one always) are declared down without an operator.
pub const BLAST_WINDOW_MS: u64 = 60_000;

impl State {
    pub(super) fn change_node(&mut self, id: NodeId, change: &NodeChange, now_ms: u64) -> Outcome {
        let before = self.nodes.get(&id).ok_or(Refusal::NoNode(id))?;
        let mut node = before.as_ref().clone();
        let offer = &mut node.offer;
        match change {
            NodeChange::Policy(policy) => offer.policy = policy.as_ref().clone(),
            NodeChange::Capacity(capacity) => offer.capacity = Some(*capacity),
            NodeChange::Drain { grace_ms } => {
                node.cordoned = true;
                offer.drain_grace_ms = Some(*grace_ms);
            }
            NodeChange::Suspect if offer.status == NodeStatus::Up => {
                offer.status = NodeStatus::Suspected;
                offer.suspicion = self.revision;
            }
            NodeChange::Suspect => {}
            NodeChange::Clear => {
                offer.status = NodeStatus::Up;
                offer.suspicion = 0;
                offer.vouched = false;
            }
            NodeChange::Down { suspicion, settled } => {
                self.check_down(id, *suspicion, *settled, now_ms)?;
                self.is_down(offer, now_ms);
            }
            NodeChange::ForceDown => {
                offer.vouched = true;
                self.is_down(offer, now_ms);
            }
            NodeChange::Leased(leased) => offer.leased = *leased,
        }
        if self.nodes.get(&id).is_none_or(|before| **before != node) {
            self.put_node(node);
        }
        Ok(Answer::Done)
    }

    fn is_down(&self, offer: &mut NodeOffer, now_ms: u64) {
        if offer.status == NodeStatus::Down {
            return;
        }
        offer.status = NodeStatus::Down;
        offer.down_at_ms = now_ms.max(1);
        if self.checks_health() {
            offer.down_revision = self.revision;
        }
    }

    /// Whether this node may be declared down now because of this suspicion.
    ///
    /// # Errors
    /// It is not suspected, or by a later suspicion; too many nodes were declared down just before.
    pub fn check_down(
        &self,
        id: NodeId,
        suspicion: u64,
        settled: Option<u64>,
        now_ms: u64,
    ) -> Result<(), Refusal> {
        let offer = &self.nodes.get(&id).ok_or(Refusal::NoNode(id))?.offer;
        match offer.status {
            NodeStatus::Down => return Ok(()),
            NodeStatus::Suspected if offer.suspicion == suspicion => {}
            NodeStatus::Suspected | NodeStatus::Up => return Err(Refusal::NotSuspected(id)),
        }
        let window = now_ms.saturating_sub(BLAST_WINDOW_MS);
        let is_recent = |offer: &NodeOffer| match settled {
            Some(settled) => offer.down_revision > settled,
            None => offer.down_at_ms > window,
        };
        let recent = self.nodes.values().filter(|node| is_recent(&node.offer)).count();
        let most = (self.nodes.len() / 3).max(1);
        if recent >= most { Err(Refusal::TooManyDown { recent, most }) } else { Ok(()) }
    }
}
