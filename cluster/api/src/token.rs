//! Tokens as texts. Each says which cluster it is for and by which authority that cluster is known, so that whoever holds it
//! can tell the cluster from an impostor before saying the secret.
//!
//! ```text
//! blixard-join.CLUSTER.SHA256.SECRET.EXPIRY.ADDRESS,ADDRESS…
//! blixard-api.CLUSTER.SHA256.SECRET
//! ```
//!
//! SHA256 is that of the authority's certificate, EXPIRY milliseconds of Unix time, both hexadecimal as SECRET is.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

/// Most addresses of a join token.
const ADDRESSES_MAX: usize = 16;
/// Longest text of a token.
const TEXT_MAX: usize = 4096;

/// What tells a cluster from an impostor, and a user from a stranger.
#[derive(Clone, PartialEq, Eq)]
pub struct Access {
    /// Identity of the cluster.
    pub cluster: String,
    /// SHA-256 of the certificate of its authority, hexadecimal.
    pub authority_sha256: String,
    /// The secret, hexadecimal.
    pub secret: String,
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Access({})", self.cluster)
    }
}

/// A token that lets one node join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// The cluster and the secret.
    pub access: Access,
    /// When it ends, in milliseconds of Unix time.
    pub expires_at_ms: u64,
    /// Where nodes of the cluster can be reached.
    pub addresses: Vec<SocketAddr>,
}

/// A token for the API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiToken(pub Access);

/// A text that is no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotAToken {
    /// It is no join token.
    #[error("not a join token: blixard-join.… as `blixard cluster token create` prints it is needed")]
    Join,
    /// It is no token for the API.
    #[error("not a token for the API: blixard-api.… as `blixard token create` prints it is needed")]
    Api,
}

fn hexadecimal(text: &str, length: usize) -> Option<String> {
    (text.len() == length && text.bytes().all(|b| b.is_ascii_hexdigit())).then(|| text.to_ascii_lowercase())
}

fn access<'a>(parts: &mut impl Iterator<Item = &'a str>) -> Option<Access> {
    let cluster = parts.next()?;
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    if cluster.is_empty() || cluster.len() > 40 || !cluster.bytes().all(plain) {
        return None;
    }
    Some(Access {
        cluster: cluster.to_owned(),
        authority_sha256: hexadecimal(parts.next()?, 64)?,
        secret: hexadecimal(parts.next()?, 64)?,
    })
}

impl FromStr for JoinToken {
    type Err = NotAToken;

    fn from_str(text: &str) -> Result<Self, NotAToken> {
        let parse = || {
            let text = text.trim();
            let mut parts =
                text.strip_prefix("blixard-join.").filter(|_| text.len() <= TEXT_MAX)?.splitn(5, '.');
            let access = access(&mut parts)?;
            let expires_at_ms = u64::from_str_radix(parts.next()?, 16).ok()?;
            let addresses: Option<Vec<SocketAddr>> =
                parts.next()?.split(',').map(|a| a.parse().ok()).collect();
            let addresses = addresses.filter(|list| list.len() <= ADDRESSES_MAX)?;
            Some(Self { access, expires_at_ms, addresses })
        };
        parse().ok_or(NotAToken::Join)
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Access { cluster, authority_sha256, secret } = &self.access;
        let addresses: Vec<String> = self.addresses.iter().map(ToString::to_string).collect();
        let addresses = addresses.join(",");
        write!(f, "blixard-join.{cluster}.{authority_sha256}.{secret}.{:x}.{addresses}", self.expires_at_ms)
    }
}

impl FromStr for ApiToken {
    type Err = NotAToken;

    fn from_str(text: &str) -> Result<Self, NotAToken> {
        let text = text.trim();
        let rest = text.strip_prefix("blixard-api.").filter(|_| text.len() <= TEXT_MAX);
        let mut parts = rest.ok_or(NotAToken::Api)?.split('.');
        let access = access(&mut parts).filter(|_| parts.next().is_none());
        access.map(Self).ok_or(NotAToken::Api)
    }
}

impl fmt::Display for ApiToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Access { cluster, authority_sha256, secret } = &self.0;
        write!(f, "blixard-api.{cluster}.{authority_sha256}.{secret}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access() -> Access {
        Access { cluster: "01kx".into(), authority_sha256: "ab".repeat(32), secret: "01".repeat(32) }
    }

    #[test]
    fn tokens_come_back_from_their_text() {
        let addresses = vec!["192.0.2.1:7440".parse().unwrap(), "[2001:db8::1]:7440".parse().unwrap()];
        let join = JoinToken { access: access(), expires_at_ms: 1_795_000_000_000, addresses };
        assert_eq!(join.to_string().parse(), Ok(join));
        let api = ApiToken(access());
        assert_eq!(format!(" {api}\n").parse(), Ok(api));
    }

    #[test]
    fn what_is_no_token_is_refused() {
        let join =
            JoinToken { access: access(), expires_at_ms: 1, addresses: vec!["192.0.2.1:1".parse().unwrap()] };
        let text = join.to_string();
        for wrong in [
            String::new(),
            text.replace("join", "jion"),
            text.replace("01kx", "01KX"),
            text.replace("abab", "abxx"),
            text.replace("192.0.2.1:1", "host:1"),
            text.replace("192.0.2.1:1", ""),
            format!("{text},"),
            text.chars().take(60).collect(),
        ] {
            assert_eq!(wrong.parse::<JoinToken>(), Err(NotAToken::Join), "{wrong}");
        }
        assert_eq!(text.parse::<ApiToken>(), Err(NotAToken::Api));
        assert_eq!(format!("{}.x", ApiToken(access())).parse::<ApiToken>(), Err(NotAToken::Api));
    }

    #[test]
    fn a_secret_is_not_printed_by_accident() {
        assert!(!format!("{:?}", ApiToken(access())).contains("0101"));
    }
}
