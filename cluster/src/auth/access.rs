//! Who may use the API over TLS: whoever says the secret of a token that is kept and not over.

use super::sha256_hex;
use crate::state::State;

/// Name of the token with this secret.
pub fn token_of(state: &State, secret: &str, now_ms: u64) -> Option<String> {
    // The digest of what was said is compared: how long that takes says nothing about the secret.
    let sha256 = sha256_hex(secret.as_bytes());
    let token = state.api_tokens().find(|token| token.sha256 == sha256)?;
    let over = token.expires_at_ms.is_some_and(|end| end <= now_ms);
    (!over).then(|| token.name.clone())
}

/// The secret of an `Authorization` header (RFC 6750 section 2.1).
pub fn bearer(value: &str) -> Option<&str> {
    let (scheme, secret) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| secret.trim()).filter(|secret| !secret.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::testing::Cluster;
    use crate::state::{ApiTokenRecord, Command, MemberCommand};

    #[test]
    fn a_secret_opens_until_its_token_is_over_or_revoked() {
        let mut cluster = Cluster::new(16);
        let token = ApiTokenRecord {
            name: "ci".into(),
            sha256: sha256_hex(b"secret"),
            created_at_ms: 1,
            expires_at_ms: Some(10),
        };
        cluster.run(Command::Member(Box::new(MemberCommand::PutApiToken(token)))).unwrap();
        assert_eq!(token_of(&cluster.state, "secret", 9).as_deref(), Some("ci"));
        assert_eq!(token_of(&cluster.state, "secret", 10), None);
        assert_eq!(token_of(&cluster.state, "other", 9), None);
        let revoke = MemberCommand::DeleteApiToken { name: "ci".into() };
        cluster.run(Command::Member(Box::new(revoke))).unwrap();
        assert_eq!(token_of(&cluster.state, "secret", 9), None);
    }

    #[test]
    fn only_a_bearer_says_a_secret() {
        assert_eq!(bearer("Bearer abc"), Some("abc"));
        assert_eq!(bearer("bearer  abc "), Some("abc"));
        for wrong in ["", "abc", "Basic abc", "Bearer ", "Bearer"] {
            assert_eq!(bearer(wrong), None, "{wrong}");
        }
    }
}
