//! Commands and records about the cluster itself: its nodes, whom it trusts, tokens, the feature level.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::records::NodeId;

/// Most join tokens and API tokens that are kept, each.
pub const TOKENS_MAX: usize = 1000;
/// Most nodes.
pub const NODES_MAX: usize = 5000;

/// Text that must not be shown: it is stored and sent, but not printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// The text.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// A certificate authority of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authority {
    /// Its certificate, PEM.
    pub certificate_pem: String,
    /// SHA-256 of the certificate (DER), hexadecimal: what tokens carry.
    pub sha256: String,
    /// When it was made, in milliseconds of Unix time.
    pub created_at_ms: u64,
    /// Its key, PKCS#8 PEM.
    pub key_pem: Secret,
}

/// Whom the nodes of the cluster trust. While the authority is changed there are two.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrustRecord {
    /// Identity of the cluster.
    pub cluster: String,
    /// Grows with each change.
    pub version: u64,
    /// Trusted authorities.
    pub authorities: Vec<Authority>,
    /// Index of the one that signs.
    pub signer: usize,
}

impl TrustRecord {
    /// The authority that signs.
    pub fn signer(&self) -> Option<&Authority> {
        self.authorities.get(self.signer)
    }

    /// The certificates of all authorities, PEM, the one that signs first.
    pub fn authorities_pem(&self) -> String {
        let others = self.authorities.iter().enumerate().filter(|(n, _)| *n != self.signer).map(|(_, a)| a);
        self.signer().into_iter().chain(others).map(|a| a.certificate_pem.as_str()).collect()
    }

    /// The next step of a change of the authority, when one is under way: all nodes trust the new one → it signs → the old one
    /// is forgotten.
    #[must_use]
    pub fn next_step(&self) -> Option<Self> {
        let last = self.authorities.len().checked_sub(1).filter(|last| *last > 0)?;
        let mut next = self.clone();
        next.version = self.version.saturating_add(1);
        if self.signer == last {
            next.authorities.drain(..last);
            next.signer = 0;
        } else {
            next.signer = last;
        }
        Some(next)
    }
}

/// A join token that may be used once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinTokenRecord {
    /// SHA-256 of the secret, hexadecimal.
    pub sha256: String,
    /// When it was made, in milliseconds of Unix time.
    pub created_at_ms: u64,
    /// When it ends, in milliseconds of Unix time.
    pub expires_at_ms: u64,
}

/// A token for the API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiTokenRecord {
    /// Name for people.
    pub name: String,
    /// SHA-256 of the secret, hexadecimal.
    pub sha256: String,
    /// When it was made, in milliseconds of Unix time.
    pub created_at_ms: u64,
    /// When it ends, in milliseconds of Unix time; absent: never.
    #[serde(default)]
    pub expires_at_ms: Option<u64>,
}

/// What a node says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFacts {
    /// Name for people.
    pub name: String,
    /// Where other nodes and users reach it; absent on a node that no other one can join.
    #[serde(default)]
    pub address: Option<SocketAddr>,
    /// Its public key (Ed25519), hexadecimal.
    #[serde(default)]
    pub public_key: Option<String>,
    /// Where it stands: `zone`, `rack` and whatever else is told apart.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Version of its program.
    pub version: String,
    /// Highest feature level that its program knows.
    pub feature_level: u32,
    /// Version of the trust that its certificate follows.
    #[serde(default)]
    pub trust_version: u64,
}

/// A change of the cluster itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemberCommand {
    /// Changes whom nodes trust. Legal when it is the version after the present one.
    SetTrust(Box<TrustRecord>),
    /// Makes a join token.
    PutJoinToken(JoinTokenRecord),
    /// Forgets a join token by its digest, or by the beginning of it when that is unambiguous.
    DeleteJoinToken {
        /// SHA-256 of the secret.
        sha256: String,
    },
    /// Uses a join token: makes a node. Repeating it with the same token and key answers the node that is there.
    Join {
        /// SHA-256 of the token's secret.
        token: String,
        /// The node.
        facts: Box<NodeFacts>,
    },
    /// Keeps what a node says about itself. Legal for a known node whose name is its own.
    Announce {
        /// Which.
        node: NodeId,
        /// What it says.
        facts: Box<NodeFacts>,
    },
    /// Lets a node get no new VMs, or lets it again.
    Cordon {
        /// Which.
        node: NodeId,
        /// No new VMs.
        cordoned: bool,
    },
    /// Forgets a node for ever. Legal when no VM is placed there but those that shall be gone, which are forgotten too.
    Remove {
        /// Which.
        node: NodeId,
    },
    /// Raises the feature level. Legal when every node knows it.
    RaiseLevel {
        /// To which.
        level: u32,
        /// Who asks.
        node: NodeId,
        /// What that node's program knows.
        knows: u32,
    },
    /// Makes a token for the API, in place of one with the same name.
    PutApiToken(ApiTokenRecord),
    /// Forgets a token for the API.
    DeleteApiToken {
        /// Its name.
        name: String,
    },
}

impl MemberCommand {
    /// Name of the variant, for logs and metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::SetTrust(_) => "set_trust",
            Self::PutJoinToken(_) => "put_join_token",
            Self::DeleteJoinToken { .. } => "delete_join_token",
            Self::Join { .. } => "join",
            Self::Announce { .. } => "announce",
            Self::Cordon { .. } => "cordon",
            Self::Remove { .. } => "remove_node",
            Self::RaiseLevel { .. } => "raise_level",
            Self::PutApiToken(_) => "put_api_token",
            Self::DeleteApiToken { .. } => "delete_api_token",
        }
    }

    /// The feature level from which on it may be proposed.
    pub fn level(&self) -> u32 {
        match self {
            // How a cluster of one node of an older version gets further.
            Self::RaiseLevel { .. } => 1,
            _ => 2,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_of_the_authority_never_leaves_a_node_without_one_it_knows() {
        let authority = |name: &str| Authority {
            certificate_pem: name.into(),
            sha256: name.into(),
            created_at_ms: 1,
            key_pem: Secret::from(String::new()),
        };
        let begun = TrustRecord {
            cluster: "c".into(),
            version: 2,
            authorities: vec![authority("old"), authority("new")],
            signer: 0,
        };
        let switched = begun.next_step().unwrap();
        assert_eq!((switched.signer().unwrap().sha256.as_str(), switched.authorities.len()), ("new", 2));
        let ended = switched.next_step().unwrap();
        assert_eq!((ended.authorities_pem().as_str(), ended.version), ("new", 4));
        assert_eq!(ended.next_step(), None);
    }

    #[test]
    fn secrets_are_not_printed() {
        let secret = Secret::from("hidden".to_owned());
        assert!(!format!("{secret:?}").contains("hidden"));
    }
}
