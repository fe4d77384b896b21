//! Long answers: logs as they are written, changes as they happen.

use std::collections::VecDeque;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::Method;
use hyper::body::{Bytes, Incoming};

use super::error::ClientError;
use super::host::Host;
use super::transport::{self, Call};
use crate::watch::{Change, Event};

/// Longest line of a watch in bytes.
const LINE_BYTES_MAX: usize = 4 << 20;
/// A watch that is silent for so long is broken: a beat is due every 15 s.
const SILENCE: Duration = Duration::from_secs(45);
/// Pauses before a broken watch is opened again; after the last one it is given up.
const PAUSES_MS: [u64; 7] = [0, 50, 200, 500, 1000, 2000, 4000];

/// Bytes of a long answer.
pub struct ByteStream {
    host: Host,
    body: Incoming,
}

impl ByteStream {
    pub(super) fn new(host: Host, body: Incoming) -> Self {
        Self { host, body }
    }

    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        loop {
            let Some(frame) = self.body.frame().await else { return Ok(None) };
            let frame = frame.map_err(|source| ClientError::Broken { host: self.host.clone(), source })?;
            if let Ok(data) = frame.into_data() {
                return Ok(Some(data));
            }
        }
    }
}

/// Changes in order of revision. A broken connection is opened again after the last revision seen.
pub struct Watch {
    host: Host,
    after: u64,
    lines: Option<Lines>,
    failures: usize,
}

struct Lines {
    stream: ByteStream,
    partial: Vec<u8>,
    whole: VecDeque<Event>,
}

impl Watch {
    pub(super) fn new(host: Host, after: u64) -> Self {
        Self { host, after, lines: None, failures: 0 }
    }

    /// Revision of the last change seen.
    pub fn revision(&self) -> u64 {
        self.after
    }

    /// The next change; beats are left out.
    ///
    /// # Errors
    /// The node refused (410: the revision is no longer known, list again and begin a new watch), or it could not be
    /// reached for about 8 s.
    pub async fn next(&mut self) -> Result<Event, ClientError> {
        loop {
            let event = match self.step().await {
                Ok(event) => event,
                Err(error) => {
                    self.lines = None;
                    let pause = PAUSES_MS.get(self.failures);
                    match pause {
                        Some(pause) if error.retryable() => {
                            self.failures += 1;
                            tokio::time::sleep(Duration::from_millis(*pause)).await;
                            continue;
                        }
                        _ => return Err(error),
                    }
                }
            };
            self.failures = 0;
            self.after = self.after.max(event.revision);
            if event.change != Change::Beat {
                return Ok(event);
            }
        }
    }

    async fn step(&mut self) -> Result<Event, ClientError> {
        if self.lines.is_none() {
            let mut call = Call::new(Method::GET, format!("/v1/watch?after={}", self.after));
            let response = transport::send(&self.host, &mut call).await?;
            let stream = ByteStream::new(self.host.clone(), response.into_body());
            self.lines = Some(Lines { stream, partial: vec![], whole: VecDeque::new() });
        }
        let silence = ClientError::NoAnswer { host: self.host.clone(), time: SILENCE };
        match &mut self.lines {
            Some(lines) => {
                tokio::time::timeout(SILENCE, lines.next(&self.host)).await.map_err(|_| silence)?
            }
            None => Err(silence),
        }
    }
}

impl Lines {
    async fn next(&mut self, host: &Host) -> Result<Event, ClientError> {
        loop {
            if let Some(event) = self.whole.pop_front() {
                return Ok(event);
            }
            let Some(data) = self.stream.next().await? else {
                let ended = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
                return Err(ClientError::Connect { host: host.clone(), source: ended });
            };
            self.partial.extend_from_slice(&data);
            while let Some(end) = self.partial.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.partial.drain(..=end).collect();
                let event = serde_json::from_slice(&line)
                    .map_err(|source| ClientError::Unreadable { host: host.clone(), source })?;
                self.whole.push_back(event);
            }
            if self.partial.len() > LINE_BYTES_MAX {
                return Err(ClientError::TooLong { host: host.clone(), limit: LINE_BYTES_MAX });
            }
        }
    }
}
