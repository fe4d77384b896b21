//! What mutations share: idempotency keys, `If-Match`, and the way through consensus.

use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use blixard_agent_api::Digest;
use blixard_api::IDEMPOTENCY_HEADER;
use sha2::{Digest as _, Sha256};

use super::Api;
use super::error::Failure;
use crate::state::{Answer, Command, Key, Outcome, Proposal};

/// Longest idempotency key in characters.
const KEY_MAX: usize = 128;

/// The idempotency key of a request, if it has one. Its fingerprint covers method, path, query and `body`.
///
/// # Errors
/// 422 when the key is not of the form.
pub fn key(parts: &Parts, body: &[u8]) -> Result<Option<Key>, Failure> {
    let Some(value) = parts.headers.get(IDEMPOTENCY_HEADER) else { return Ok(None) };
    let text = value.to_str().ok().filter(|t| !t.is_empty() && t.len() <= KEY_MAX).ok_or_else(|| {
        let form = format!("1 to {KEY_MAX} printable ASCII characters are possible");
        Failure::field(IDEMPOTENCY_HEADER, "bad_format", form)
    })?;
    let mut hash = Sha256::new();
    for part in [parts.method.as_str(), parts.uri.path(), parts.uri.query().unwrap_or("")] {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    hash.update(body);
    let fingerprint = Digest::from_bytes(hash.finalize().into());
    Ok(Some(Key { text: text.to_owned(), fingerprint }))
}

/// The generation of `If-Match`, with or without quotation marks (RFC 9110 section 13.1.1).
///
/// # Errors
/// 422 when it is no generation.
pub fn if_match(headers: &HeaderMap) -> Result<Option<u64>, Failure> {
    let Some(value) = headers.get(header::IF_MATCH) else { return Ok(None) };
    let number = value.to_str().ok().and_then(|t| t.trim_matches('"').parse().ok());
    let form = "the generation of the VM, a number, is needed";
    number.map(Some).ok_or_else(|| Failure::field("if-match", "bad_format", form))
}

impl Api {
    /// The kept answer of this key, with its revision. Asked before anything is checked that may have changed since.
    ///
    /// # Errors
    /// 409 when the key came with another request.
    pub fn recall(&self, key: Option<&Key>) -> Result<Option<(u64, Answer)>, Failure> {
        let Some(key) = key else { return Ok(None) };
        let state = self.consensus.replica().state();
        let Some(kept) = state.kept_answer(&key.text) else { return Ok(None) };
        let expired =
            kept.at_ms.saturating_add(crate::state::ANSWER_KEPT_MS) <= self.consensus.clock().now_ms();
        if expired {
            return Ok(None);
        }
        if kept.fingerprint != key.fingerprint {
            return Err(crate::state::Refusal::KeyReused.into());
        }
        Ok(Some((kept.revision, kept.answer.clone())))
    }

    /// Proposes a command; answers the revision and what applying it answered.
    ///
    /// # Errors
    /// What the state refused, or 503.
    pub async fn propose(&self, key: Option<Key>, command: Command) -> Result<(u64, Answer), Failure> {
        let (revision, outcome) = self.propose_raw(key, command).await?;
        Ok((revision, outcome?))
    }

    /// The same, for callers that do something about a refusal.
    ///
    /// # Errors
    /// 503.
    pub async fn propose_raw(&self, key: Option<Key>, command: Command) -> Result<(u64, Outcome), Failure> {
        let kind = command.kind();
        let proposal = Proposal { now_ms: self.consensus.clock().now_ms(), key, command };
        let (revision, outcome) = self.consensus.propose(proposal).await?;
        self.metrics.command(kind, outcome.is_ok());
        Ok((revision, outcome))
    }
}
