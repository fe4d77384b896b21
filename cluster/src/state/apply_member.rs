//! Commands about the cluster itself: what each changes, or why it is refused.

use std::sync::Arc;

use blixard_api::vm::Desired;

use super::command::{Answer, Outcome, Refusal};
use super::member::{
    ApiTokenRecord, JoinTokenRecord, MemberCommand, NODES_MAX, NodeFacts, TOKENS_MAX, TrustRecord,
};
use super::records::{NodeId, NodeRecord};
use super::{RecordKey, State};
use crate::scheduler::cluster;

/// Most names that a refusal lists.
const NAMED_MAX: usize = 5;

impl State {
    /// Applies a command about the cluster itself.
    pub(super) fn run_member(&mut self, command: &MemberCommand, now_ms: u64) -> Outcome {
        match command {
            MemberCommand::SetTrust(trust) => self.set_trust(trust),
            MemberCommand::PutJoinToken(token) => self.put_join_token(token, now_ms),
            MemberCommand::DeleteJoinToken { sha256 } => {
                let mut found = self.join_tokens.keys().filter(|key| key.starts_with(sha256.as_str()));
                let key = match (found.next(), found.next()) {
                    (Some(key), None) => key.clone(),
                    _ => return Err(Refusal::NoToken),
                };
                self.forget_join_token(&key);
                Ok(Answer::Done)
            }
            MemberCommand::Join { token, facts } => self.join(token, facts, now_ms),
            MemberCommand::Announce { node, facts } => self.announce(*node, facts),
            MemberCommand::Cordon { node, cordoned } => {
                let mut record = self.known_node(*node)?;
                record.cordoned = *cordoned;
                if !cordoned {
                    record.offer.drain_grace_ms = None;
                }
                Ok(Answer::Node(self.put_node(record)))
            }
            MemberCommand::Remove { node } => self.remove_node(*node),
            MemberCommand::RaiseLevel { level, node, knows } => self.raise_level(*level, *node, *knows),
            MemberCommand::PutApiToken(token) => self.put_api_token(token),
            MemberCommand::DeleteApiToken { name } => {
                self.api_tokens.remove(name).ok_or(Refusal::NoToken)?;
                self.changed.insert(RecordKey::ApiToken(name.clone()));
                Ok(Answer::Done)
            }
        }
    }

    fn set_trust(&mut self, trust: &TrustRecord) -> Outcome {
        let present = self.trust.as_ref().map_or(0, |trust| trust.version);
        let same = self.trust.as_ref().is_none_or(|known| known.cluster == trust.cluster);
        if trust.version != present.saturating_add(1) || !same || trust.signer().is_none() {
            return Err(Refusal::Changed("whom the nodes trust".into()));
        }
        self.trust = Some(Arc::new(trust.clone()));
        self.changed.insert(RecordKey::Trust);
        Ok(Answer::Done)
    }

    fn put_join_token(&mut self, token: &JoinTokenRecord, now_ms: u64) -> Outcome {
        let over: Vec<String> = self
            .join_tokens
            .values()
            .filter(|known| known.expires_at_ms <= now_ms)
            .map(|known| known.sha256.clone())
            .collect();
        over.iter().for_each(|sha256| self.forget_join_token(sha256));
        if self.join_tokens.len() >= TOKENS_MAX {
            return Err(Refusal::TooManyTokens(TOKENS_MAX));
        }
        self.join_tokens.insert(token.sha256.clone(), Arc::new(token.clone()));
        self.changed.insert(RecordKey::JoinToken(token.sha256.clone()));
        Ok(Answer::Done)
    }

    fn forget_join_token(&mut self, sha256: &str) {
        self.join_tokens.remove(sha256);
        self.changed.insert(RecordKey::JoinToken(sha256.to_owned()));
    }

    fn join(&mut self, token: &str, facts: &NodeFacts, now_ms: u64) -> Outcome {
        let again = self.nodes.values().find(|node| node.joined_with.as_deref() == Some(token));
        if let Some(node) = again {
            // The answer may have been lost on its way; somebody else with the same token has another key.
            return if node.public_key.is_some() && node.public_key == facts.public_key {
                Ok(Answer::Node(Arc::clone(node)))
            } else {
                Err(Refusal::NoToken)
            };
        }
        let known = self.join_tokens.get(token).ok_or(Refusal::NoToken)?;
        if known.expires_at_ms <= now_ms {
            return Err(Refusal::TokenExpired);
        }
        if let Some(other) = self.nodes.values().find(|node| node.name == facts.name) {
            return Err(Refusal::NodeNameTaken(other.name.clone()));
        }
        if self.nodes.len() >= NODES_MAX {
            return Err(Refusal::TooManyNodes(NODES_MAX));
        }
        let cluster = self.cluster.as_mut().ok_or(Refusal::NoToken)?;
        if facts.feature_level < cluster.feature_level {
            return Err(Refusal::Level { needs: cluster.feature_level, has: facts.feature_level });
        }
        let id = cluster.next_node;
        Arc::make_mut(cluster).next_node = id.saturating_add(1);
        self.changed.insert(RecordKey::Cluster);
        self.forget_join_token(token);
        let mut node = NodeRecord::new(id, &facts.name);
        node.joined_with = Some(token.to_owned());
        node.joined_at_ms = now_ms;
        node.plan_base = now_ms.saturating_mul(super::apply::REVISIONS_PER_MS);
        node.learn(facts);
        self.put_node(node);
        self.touch_plan(id);
        self.nodes.get(&id).cloned().map(Answer::Node).ok_or(Refusal::NoNode(id))
    }

    fn announce(&mut self, node: NodeId, facts: &NodeFacts) -> Outcome {
        let mut record = self.known_node(node)?;
        if self.nodes.values().any(|other| other.id != node && other.name == facts.name) {
            return Err(Refusal::NodeNameTaken(facts.name.clone()));
        }
        record.learn(facts);
        Ok(Answer::Node(self.put_node(record)))
    }

    fn remove_node(&mut self, node: NodeId) -> Outcome {
        let record = self.known_node(node)?;
        if self.nodes.len() == 1 {
            return Err(Refusal::LastNode);
        }
        let mut placed = self.vms.values().filter(|vm| vm.node == node && vm.desired != Desired::Gone);
        let vms: Vec<String> = placed.by_ref().take(NAMED_MAX).map(|vm| vm.name.clone()).collect();
        if !vms.is_empty() {
            return Err(Refusal::InUse { vms, more: placed.count() });
        }
        let leaving: Vec<_> = self.vms.values().filter(|vm| vm.node == node).cloned().collect();
        for vm in leaving {
            self.unindex(&vm);
            self.vms.remove(&vm.id);
            self.changed.insert(RecordKey::Vm(vm.id));
        }
        self.nodes.remove(&node);
        self.view.remove_node(node);
        self.changed.insert(RecordKey::Node(node));
        Ok(Answer::Node(Arc::new(record)))
    }

    fn raise_level(&mut self, level: u32, node: NodeId, knows: u32) -> Outcome {
        if let Some(record) = self.nodes.get_mut(&node).filter(|record| record.feature_level != knows) {
            Arc::make_mut(record).feature_level = knows;
            self.changed.insert(RecordKey::Node(node));
        }
        if let Some(behind) = self.nodes.values().find(|node| node.feature_level < level) {
            return Err(Refusal::NodeBehind {
                name: behind.name.clone(),
                knows: behind.feature_level,
                wanted: level,
            });
        }
        let cluster = self.cluster.as_mut().ok_or(Refusal::NoNode(node))?;
        if cluster.feature_level < level {
            Arc::make_mut(cluster).feature_level = level;
            self.changed.insert(RecordKey::Cluster);
            // What a VM takes depends on it.
            self.loaded();
        }
        Ok(Answer::Done)
    }

    fn put_api_token(&mut self, token: &ApiTokenRecord) -> Outcome {
        if !self.api_tokens.contains_key(&token.name) && self.api_tokens.len() >= TOKENS_MAX {
            return Err(Refusal::TooManyTokens(TOKENS_MAX));
        }
        self.api_tokens.insert(token.name.clone(), Arc::new(token.clone()));
        self.changed.insert(RecordKey::ApiToken(token.name.clone()));
        Ok(Answer::Done)
    }

    fn known_node(&self, node: NodeId) -> Result<NodeRecord, Refusal> {
        self.nodes.get(&node).map(|record| record.as_ref().clone()).ok_or(Refusal::NoNode(node))
    }

    pub(super) fn put_node(&mut self, record: NodeRecord) -> Arc<NodeRecord> {
        self.view.set_node(cluster::node_info(&record));
        let record = Arc::new(record);
        self.changed.insert(RecordKey::Node(record.id));
        self.nodes.insert(record.id, Arc::clone(&record));
        record
    }
}

#[cfg(test)]
#[path = "apply_member_test.rs"]
mod tests;
