//! Content by digest on its way between members: a request, parts, an end. Who receives it hashes it: a member cannot pass
//! on anything else than what was asked for.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::Duration;

use blixard_agent_api::{BlobRef, Digest};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tempfile::TempPath;
use tokio::io::{AsyncRead, AsyncWrite};

use super::frame::{self, Kind};
use crate::images::blobs::BlobStore;
use crate::raft::Consensus;
use crate::state::NodeId;

/// Bytes of a part.
const PART_BYTES: usize = 256 << 10;
/// Longest wait for the next part.
const PART_MAX: Duration = Duration::from_secs(10);

/// The request.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Begin {
    /// What is wanted.
    digest: Digest,
}

/// The end.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum End {
    /// That was all of it.
    Whole,
    /// It is not here.
    Missing,
}

fn wrong(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

async fn in_time<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(PART_MAX, work).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

fn next_part(mut file: File) -> io::Result<(File, Vec<u8>)> {
    let mut part = Vec::with_capacity(PART_BYTES);
    Read::by_ref(&mut file).take(PART_BYTES as u64).read_to_end(&mut part)?;
    Ok((file, part))
}

/// Answers a request.
pub(super) async fn serve(
    stream: &mut (impl AsyncWrite + Unpin),
    request: &[u8],
    blobs: &BlobStore,
) -> io::Result<()> {
    let Begin { digest } = serde_json::from_slice(request)?;
    let end = match blobs.open(digest) {
        Err(_) => End::Missing,
        Ok(mut file) => loop {
            let part: Vec<u8>;
            (file, part) =
                tokio::task::spawn_blocking(move || next_part(file)).await.map_err(io::Error::other)??;
            if part.is_empty() {
                break End::Whole;
            }
            in_time(frame::write(stream, Kind::ContentPart, 0, &part)).await?;
        },
    };
    in_time(frame::write(stream, Kind::ContentEnd, 0, &serde_json::to_vec(&end)?)).await
}

/// Takes content into a new file of this folder; `None` when the other end has none.
async fn receive(
    stream: &mut (impl AsyncRead + Unpin),
    blob: BlobRef,
    folder: &Path,
) -> io::Result<Option<TempPath>> {
    let file = tempfile::NamedTempFile::new_in(folder)?;
    let (mut file, path): (File, TempPath) = file.into_parts();
    let mut hash = Sha256::new();
    let mut left = blob.size_bytes;
    loop {
        let part = in_time(frame::read(stream)).await?;
        let part = part.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        match part.kind {
            Kind::ContentPart => {
                let length = u64::try_from(part.content.len()).map_err(io::Error::other)?;
                left = left.checked_sub(length).ok_or_else(|| wrong("more than was asked for".into()))?;
                (file, hash) = tokio::task::spawn_blocking(move || {
                    hash.update(&part.content);
                    file.write_all(&part.content).map(|()| (file, hash))
                })
                .await
                .map_err(io::Error::other)??;
            }
            Kind::ContentEnd => {
                if matches!(serde_json::from_slice(&part.content)?, End::Missing) {
                    return Ok(None);
                }
                let found = Digest::from_bytes(hash.finalize().into());
                if left > 0 || found != blob.digest {
                    return Err(wrong(format!("it sent {found}, {left} bytes less than asked for")));
                }
                return Ok(Some(path));
            }
            other => return Err(wrong(format!("{other:?} within content"))),
        }
    }
}

impl Consensus {
    /// Fetches content from any other member that has it, into this store.
    ///
    /// # Errors
    /// No member that answers has it; with what the last one said.
    pub async fn fetch_content(&self, blob: BlobRef, blobs: &BlobStore) -> io::Result<()> {
        let own = self.node();
        let (behind, before): (Vec<NodeId>, Vec<NodeId>) = self
            .replica()
            .state()
            .nodes()
            .map(|node| node.id)
            .filter(|node| *node != own)
            .partition(|n| *n > own);
        let mut last = io::Error::new(io::ErrorKind::NotFound, "no other node has it");
        // Begins behind this node, so that not all ask the same one.
        for node in behind.into_iter().chain(before) {
            match self.fetch_from(node, blob, blobs).await {
                Ok(true) => {
                    tracing::info!(digest = %blob.digest, node, bytes = blob.size_bytes, "content fetched");
                    return Ok(());
                }
                Ok(false) => {}
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn fetch_from(&self, node: NodeId, blob: BlobRef, blobs: &BlobStore) -> io::Result<bool> {
        let mut stream = in_time(self.peers.dialer.connect(node, None)).await?;
        let request = serde_json::to_vec(&Begin { digest: blob.digest })?;
        in_time(frame::write(&mut stream, Kind::ContentBegin, 0, &request)).await?;
        let Some(path) = receive(&mut stream, blob, blobs.spool()).await? else { return Ok(false) };
        let blobs = blobs.clone();
        let kept = tokio::task::spawn_blocking(move || blobs.keep(blob.digest, &path));
        kept.await.map_err(io::Error::other)?.map_err(io::Error::other)?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(folder: &Path, contents: &[&[u8]]) -> (BlobStore, Vec<BlobRef>) {
        let store = BlobStore::open_at(folder).unwrap();
        let keep = |content: &&[u8]| {
            let file = store.spool().join("x");
            std::fs::write(&file, content).unwrap();
            store.keep(Digest::from_bytes(Sha256::digest(content).into()), &file).unwrap()
        };
        let kept = contents.iter().map(keep).collect();
        (store, kept)
    }

    async fn ask(blob: BlobRef, store: &BlobStore, folder: &Path) -> io::Result<Option<Vec<u8>>> {
        let (mut ours, mut theirs) = tokio::io::duplex(1 << 10);
        let request = serde_json::to_vec(&Begin { digest: blob.digest }).unwrap();
        let (_, received) =
            tokio::join!(serve(&mut theirs, &request, store), receive(&mut ours, blob, folder));
        Ok(received?.map(|path| std::fs::read(&path).unwrap()))
    }

    #[tokio::test]
    async fn content_arrives_whole_and_what_is_missing_is_said_to_be() {
        let (there, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let long = vec![7; PART_BYTES * 2 + 1];
        let (store, kept) = store(there.path(), &[&long, b""]);
        assert_eq!(ask(kept[0], &store, here.path()).await.unwrap().unwrap(), long);
        assert_eq!(ask(kept[1], &store, here.path()).await.unwrap().unwrap(), b"");
        let none = BlobRef { digest: Digest::from_bytes([1; 32]), size_bytes: 1 };
        assert_eq!(ask(none, &store, here.path()).await.unwrap(), None);
    }

    #[tokio::test]
    async fn something_else_than_was_asked_for_is_refused_and_leaves_no_file() {
        let (there, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (store, kept) = store(there.path(), &[b"content"]);
        std::fs::write(there.path().join("blobs").join(kept[0].digest.hex()), b"Content").unwrap();
        assert!(ask(kept[0], &store, here.path()).await.unwrap_err().to_string().contains("it sent"));
        for size_bytes in [6, 8] {
            let other = BlobRef { size_bytes, ..kept[0] };
            assert!(ask(other, &store, here.path()).await.is_err(), "{size_bytes} bytes");
        }
        assert_eq!(std::fs::read_dir(here.path()).unwrap().count(), 0);
    }
}
