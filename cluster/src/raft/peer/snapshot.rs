//! A snapshot on its way to another member: a beginning, parts with whole records, an end, and the answer. Neither end
//! holds more of it in memory than a few parts.

use std::fs::File;
use std::future::Future;
use std::io;
use std::time::Duration;

use openraft::errors::ReplicationClosed;
use openraft::raft::SnapshotResponse;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};

use super::frame::{self, Kind};
use crate::raft::state_store::{SnapshotData, put_record};
use crate::raft::types::{SnapshotMeta, Types, Vote};

/// Bytes after which a part is sent.
const PART_BYTES: usize = 256 << 10;
/// Parts that are made before they are sent.
const PARTS_AHEAD: usize = 4;
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
    let (parts, mut queue) = tokio::sync::mpsc::channel::<Vec<u8>>(PARTS_AHEAD);
    let reading = tokio::task::spawn_blocking(move || {
        let mut part = Vec::with_capacity(PART_BYTES);
        data.for_each(|key, value| {
            put_record(&mut part, key, value)?;
            if part.len() >= PART_BYTES {
                let full = std::mem::replace(&mut part, Vec::with_capacity(PART_BYTES));
                parts.blocking_send(full).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
            }
            Ok(())
        })?;
        parts.blocking_send(part).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
    });
    let exchange = async {
        let head = serde_json::to_vec(begin)?;
        timed_out(tokio::time::timeout(PART_MAX, frame::write(stream, Kind::SnapshotBegin, 0, &head)).await)?;
        while let Some(part) = queue.recv().await {
            let sent = frame::write(stream, Kind::SnapshotPart, 0, &part);
            timed_out(tokio::time::timeout(PART_MAX, sent).await)?;
        }
        reading.await.map_err(io::Error::other)??;
        frame::write(stream, Kind::SnapshotEnd, 0, &[]).await?;
        let answer = timed_out(tokio::time::timeout(STORE_MAX, frame::read(stream)).await)?;
        let answer = answer.ok_or_else(|| io::Error::from(io::ErrorKind::ConnectionReset))?;
        Ok(serde_json::from_slice(&answer.content)?)
    };
    tokio::select! {
        result = exchange => result.map(Ok),
        closed = cancel => Ok(Err(closed)),
    }
}

/// Takes the parts of a snapshot in; answers them as one file.
pub(super) async fn receive(stream: &mut (impl AsyncRead + Unpin), file: File) -> io::Result<SnapshotData> {
    let mut file = tokio::fs::File::from_std(file);
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
                tokio::io::AsyncWriteExt::write_all(&mut file, &part.content).await?;
            }
            Kind::SnapshotEnd => {
                tokio::io::AsyncWriteExt::flush(&mut file).await?;
                return Ok(SnapshotData::Spool(file.into_std().await));
            }
            other => {
                let text = format!("{other:?} within a snapshot");
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
        }
    }
}
