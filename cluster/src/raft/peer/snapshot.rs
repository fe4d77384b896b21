//! A snapshot on its way to another member: a beginning, parts with whole records, an end, and the answer. Neither end
//! holds more of it in memory than a part.

use std::fs::File;
use std::future::Future;
use std::io::{self, Write};
use std::time::Duration;

use openraft::errors::ReplicationClosed;
use openraft::raft::SnapshotResponse;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};

use super::frame::{self, Kind};
use crate::raft::state_store::SnapshotData;
use crate::raft::storage::blocking;
use crate::raft::types::{SnapshotMeta, Types, Vote};

/// Bytes after which a part is sent.
const PART_BYTES: usize = 256 << 10;
/// Largest snapshot that is taken in, in bytes.
const SNAPSHOT_BYTES_MAX: u64 = 4 << 30;
/// Longest wait for the next part, and for the answer while records are stored.
const PART_MAX: Duration = Duration::from_secs(10);
const STORE_MAX: Duration = Duration::from_secs(120);

/// The beginning.
#[derive(Debug, Serialize, Deserialize)]
pub struct Begin {
    /// Vote of the sender, as leader.
    pub vote: Vote,
    /// What the snapshot holds.
    pub meta: SnapshotMeta,
}

/// The answer.
#[derive(Debug, Serialize, Deserialize)]
pub enum Installed {
    /// It is installed, or was not needed.
    Done(SnapshotResponse<Types>),
    /// It was not.
    Failed(String),
}

fn timed_out<T>(result: Result<io::Result<T>, tokio::time::error::Elapsed>) -> io::Result<T> {
    result.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Sends a snapshot; answers what the other end answered.
pub(super) async fn send(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    begin: &Begin,
    data: SnapshotData,
    cancel: impl Future<Output = ReplicationClosed>,
) -> io::Result<Result<Installed, ReplicationClosed>> {
    // Each part is read while nothing else is done: that is quick, and the view goes from one reading to the next.
    let read = |data: SnapshotData, after: Option<String>| {
        blocking(move || {
            let part = data.part(after.as_deref(), PART_BYTES)?;
            Ok((data, part))
        })
    };
    let exchange = async {
        let head = serde_json::to_vec(begin)?;
        timed_out(tokio::time::timeout(PART_MAX, frame::write(stream, Kind::SnapshotBegin, 0, &head)).await)?;
        let mut next = read(data, None).await?;
        while let (data, Some((part, last))) = next {
            let sent = frame::write(stream, Kind::SnapshotPart, 0, &part);
            timed_out(tokio::time::timeout(PART_MAX, sent).await)?;
            next = read(data, Some(last)).await?;
        }
        frame::write(stream, Kind::SnapshotEnd, 0, &[]).await?;
        let answer = timed_out(tokio::time::timeout(STORE_MAX, frame::read(stream)).await)?;
        let answer = answer.ok_or_else(|| io::Error::from(io::ErrorKind::ConnectionReset))?;
        Ok(serde_json::from_slice(&answer.content)?)
    };
    tokio::select! {
        biased;
        result = exchange => result.map(Ok),
        closed = cancel => Ok(Err(closed)),
    }
}

/// Takes the parts of a snapshot in; answers them as one file.
pub(super) async fn receive(stream: &mut (impl AsyncRead + Unpin), file: File) -> io::Result<SnapshotData> {
    let mut file = file;
    let mut length = 0_u64;
    loop {
        let part = timed_out(tokio::time::timeout(PART_MAX, frame::read(stream)).await)?;
        let part = part.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        match part.kind {
            Kind::SnapshotPart => {
                length = length.saturating_add(u64::try_from(part.content.len()).unwrap_or(u64::MAX));
                if length > SNAPSHOT_BYTES_MAX {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "the snapshot is too large"));
                }
                file = blocking(move || {
                    file.write_all(&part.content)?;
                    Ok(file)
                })
                .await?;
            }
            Kind::SnapshotEnd => {
                return Ok(SnapshotData::Spool(file));
            }
            other => {
                let text = format!("{other:?} within a snapshot");
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
        }
    }
}
