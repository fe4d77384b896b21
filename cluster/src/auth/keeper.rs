//! Keeps this node's certificate fresh and its entry in the state true, and as the leader leads a change of the authority to its
//! end. Level-triggered: each look compares what is with what shall be.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::AuthError;
use super::authority::{NODE_VALID, RENEW_BEFORE, certify};
use super::identity::{Keys, public_key};
use super::tls::{Tls, validity};
use crate::clock;
use crate::host::chain;
use crate::raft::Consensus;
use crate::state::{Command, MemberCommand, NodeFacts, Proposal, State, TrustRecord};

/// Time between two looks when nothing calls for one.
const LOOK: Duration = Duration::from_secs(600);
/// Pause after something did not work.
const PAUSE: Duration = Duration::from_secs(2);

/// What the keeper works with.
pub struct Keeper {
    /// The state.
    pub consensus: Consensus,
    /// The keys in use, when other nodes can reach this one.
    pub tls: Option<Tls>,
    /// The state folder.
    pub folder: PathBuf,
    /// Name of this node.
    pub name: String,
    /// Where this node stands.
    pub labels: BTreeMap<String, String>,
}

/// These keys trust whom this trust names, and are signed by whom it says.
fn follows(keys: &Keys, trust: &TrustRecord) -> Result<bool, AuthError> {
    let Some(signer) = trust.signer() else { return Ok(false) };
    let (_, _, signed) = validity(&keys.certificate_pem, &signer.certificate_pem)?;
    Ok(signed && keys.authorities_pem == trust.authorities_pem())
}

/// The keys by this trust that take the place of `keys`, when these do not follow it, or end soon. Pure.
///
/// A node that applies its log anew, or has just joined, passes through trusts that are over. It must not go back to one: others
/// may have forgotten its authority, and it would trust nobody whom it meets.
///
/// # Errors
/// See [`AuthError`].
pub(super) fn renewed(keys: &Keys, trust: &TrustRecord, now_ms: u64) -> Result<Option<Keys>, AuthError> {
    let older = trust.version < keys.identity.trust_version;
    let Some(signer) = trust.signer().filter(|_| !older && trust.cluster == keys.identity.cluster) else {
        return Ok(None);
    };
    let (_, end, _) = validity(&keys.certificate_pem, &signer.certificate_pem)?;
    let soon = Duration::from_millis(now_ms).saturating_add(RENEW_BEFORE).as_secs();
    if follows(keys, trust)? && u64::try_from(end).unwrap_or(0) >= soon {
        return Ok(None);
    }
    let public = public_key(&keys.key_pem)?;
    let mut next = keys.clone();
    next.certificate_pem = certify(trust, keys.identity.node, &public, now_ms, NODE_VALID)?;
    next.authorities_pem = trust.authorities_pem();
    next.identity.trust_version = trust.version;
    Ok(Some(next))
}

/// Version of the trust that a node says it follows. Pure.
///
/// # Errors
/// See [`AuthError`].
pub(super) fn followed(keys: &Keys, trust: &TrustRecord) -> Result<u64, AuthError> {
    Ok(if follows(keys, trust)? { trust.version } else { 0 })
}

/// What the leader does next about a change of the authority, once all nodes follow what there is. Pure.
pub(super) fn next_trust(state: &State) -> Option<TrustRecord> {
    let trust = state.trust()?;
    let all_follow = state.nodes().all(|node| node.trust_version >= trust.version);
    trust.next_step().filter(|_| all_follow)
}

impl Keeper {
    /// Runs until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let mut revisions = self.consensus.replica().revisions();
        loop {
            revisions.mark_unchanged();
            if let Err(error) = self.renew() {
                tracing::error!("this node's certificate cannot be renewed: {}", chain(&error));
            }
            let done = stop.run_until_cancelled(self.tell()).await;
            let wait = async {
                tokio::select! {
                    changed = revisions.changed() => changed.is_ok(),
                    () = tokio::time::sleep(LOOK) => true,
                }
            };
            let pause = async {
                tokio::time::sleep(PAUSE).await;
                true
            };
            let going = match done {
                Some(true) => stop.run_until_cancelled(wait).await,
                Some(false) => stop.run_until_cancelled(pause).await,
                None => None,
            };
            if going != Some(true) {
                return;
            }
        }
    }

    fn renew(&self) -> Result<(), AuthError> {
        let Some(tls) = &self.tls else { return Ok(()) };
        let Some(trust) = self.consensus.replica().state().trust().cloned() else { return Ok(()) };
        let Some(keys) = renewed(&tls.keys(), &trust, clock::now_ms())? else { return Ok(()) };
        keys.store(&self.folder)?;
        tls.replace(keys)?;
        tracing::info!(trust = trust.version, "this node has a new certificate");
        Ok(())
    }

    /// What this node is.
    fn facts(&self, trust: Option<&TrustRecord>) -> Result<NodeFacts, AuthError> {
        let keys = self.tls.as_ref().map(Tls::keys);
        Ok(NodeFacts {
            name: self.name.clone(),
            address: keys.as_ref().map(|keys| keys.identity.address),
            public_key: keys.as_ref().map(|keys| public_key(&keys.key_pem)).transpose()?,
            labels: self.labels.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            feature_level: crate::node::feature_level(),
            trust_version: match (&keys, trust) {
                (Some(keys), Some(trust)) => followed(keys, trust)?,
                _ => 0,
            },
        })
    }

    /// Proposes what this node should say; false when that should be tried again soon.
    async fn tell(&self) -> bool {
        let (known, trust, level, next) = {
            let state = self.consensus.replica().state();
            (
                state.node(self.consensus.node()).cloned(),
                state.trust().cloned(),
                state.cluster().map_or(0, |cluster| cluster.feature_level),
                next_trust(&state),
            )
        };
        let Some(known) = known.filter(|_| level >= 2) else { return true };
        let facts = match self.facts(trust.as_deref()) {
            Ok(facts) => facts,
            Err(error) => {
                tracing::error!("this node's key is of no use: {}", chain(&error));
                return true;
            }
        };
        if known.facts() != facts {
            let node = self.consensus.node();
            return self.propose(MemberCommand::Announce { node, facts: Box::new(facts) }).await;
        }
        if let Some(next) = next.filter(|_| self.consensus.leads()) {
            tracing::info!(version = next.version, "the change of the cluster's authority goes on");
            return self.propose(MemberCommand::SetTrust(Box::new(next))).await;
        }
        true
    }

    async fn propose(&self, command: MemberCommand) -> bool {
        let kind = command.kind();
        let proposal =
            Proposal { now_ms: clock::now_ms(), key: None, command: Command::Member(Box::new(command)) };
        match self.consensus.propose(proposal).await {
            Ok((_, Ok(_))) => true,
            Ok((_, Err(refusal))) => {
                tracing::warn!("{kind} is refused: {refusal}");
                false
            }
            Err(error) => {
                tracing::debug!("cannot propose {kind} now: {error}");
                false
            }
        }
    }
}
