//! What other members send: who they are is known from their certificate before the first frame is read.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{FutureExt, StreamExt, stream};
use openraft::Snapshot;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::call::{CALLS_MAX, Proposed, Question, ReadIndex};
use super::frame::{self, Frame, Kind};
use super::snapshot::{self, Begin, Installed};
use super::{Stream, content};
use crate::auth::tls::{Inbound, node_of};
use crate::images::blobs::BlobStore;
use crate::raft::codec::{self, Reader};
use crate::raft::membership::GIVE_UP_MAX;
use crate::raft::{Consensus, ProposeError};
use crate::state::NodeId;

/// Longest wait for the first frame.
const FIRST_MAX: Duration = Duration::from_secs(10);
/// Members that are sent content at once; others wait, and ask elsewhere when it takes too long.
const SERVED_MAX: usize = 8;
/// Append requests that are read ahead.
const REQUESTS_AHEAD: usize = 64;

/// Answers other members. Clones are the same server.
#[derive(Clone)]
pub struct PeerServer {
    consensus: Consensus,
    cluster: String,
    /// Where snapshots are taken in.
    folder: PathBuf,
    /// Content for other members, and how many are served at once.
    blobs: BlobStore,
    serving: Arc<Semaphore>,
    /// Takes connections with requests of users.
    requests: mpsc::Sender<Box<dyn Stream>>,
    stop: CancellationToken,
}

impl PeerServer {
    /// A server for this member of this cluster. `requests` takes the connections with requests of users.
    pub fn new(
        consensus: Consensus,
        cluster: String,
        folder: PathBuf,
        blobs: BlobStore,
        requests: mpsc::Sender<Box<dyn Stream>>,
        stop: CancellationToken,
    ) -> Self {
        let serving = Arc::new(Semaphore::new(SERVED_MAX));
        Self { consensus, cluster, folder, blobs, serving, requests, stop }
    }

    /// Serves one connection until it ends, once it has shown whose it is. What is wrong with it is logged with its address.
    pub async fn serve(self, stream: Inbound, from: SocketAddr) {
        let node = match self.identify(&stream) {
            Ok(node) => node,
            Err(reason) => {
                tracing::warn!(%from, "a connection of another node is refused: {reason}");
                return;
            }
        };
        self.serve_member(stream, node, from).await;
    }

    /// Serves a connection of this member until it ends.
    pub async fn serve_member(self, stream: impl Stream, node: NodeId, from: SocketAddr) {
        let stop = self.stop.clone();
        match stop.run_until_cancelled(self.answer(stream, node)).await {
            Some(Err(error)) if error.kind() == io::ErrorKind::InvalidData => {
                tracing::warn!(%from, node, "a connection of another node is closed: {error}");
            }
            Some(Err(error)) => tracing::debug!(%from, node, "a connection of another node ended: {error}"),
            Some(Ok(())) | None => {}
        }
    }

    /// The member at the other end.
    fn identify(&self, stream: &Inbound) -> Result<NodeId, String> {
        let (_, session) = stream.get_ref();
        let certificate = session.peer_certificates().and_then(|chain| chain.first());
        let certificate = certificate.ok_or("it shows no certificate")?;
        let node = node_of(certificate, &self.cluster).map_err(|error| error.to_string())?;
        if node == self.consensus.node() {
            return Err("it shows a certificate of this node".into());
        }
        self.check_member(node).map_err(|error| error.to_string())?;
        Ok(node)
    }

    /// Refuses a node that was removed; asked for each message, since its connections may be older than its removal.
    fn check_member(&self, node: NodeId) -> io::Result<()> {
        let state = self.consensus.replica().state();
        // A number that was given and is no longer known belonged to a node that was removed. A higher number may be
        // that of a node which this replica has not heard of yet.
        let given = state.cluster().is_some_and(|cluster| node < cluster.next_node);
        if given && state.node(node).is_none() {
            let reason = format!("node {node} was removed from the cluster");
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
        Ok(())
    }

    async fn answer(&self, mut stream: impl Stream, node: NodeId) -> io::Result<()> {
        let first = tokio::time::timeout(FIRST_MAX, frame::read(&mut stream)).await;
        let first = first.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        let Some(first) = first else { return Ok(()) };
        match first.kind {
            Kind::Append => self.append(stream, first, node).await,
            Kind::Call => self.calls(stream, first, node).await,
            Kind::SnapshotBegin => self.snapshot(stream, &first, node).await,
            Kind::ContentBegin => {
                let _place = self.serving.acquire().await.map_err(io::Error::other)?;
                content::serve(&mut stream, &first.content, &self.blobs).await?;
                stream.shutdown().await
            }
            Kind::Requests => self.requests(stream, node).await,
            other => Err(io::Error::new(io::ErrorKind::InvalidData, format!("it begins with {other:?}"))),
        }
    }

    /// Passes a connection with requests of users on. It breaks when the member is removed, however long a stream over it goes on.
    async fn requests(&self, stream: impl Stream, node: NodeId) -> io::Result<()> {
        let (open, mut closed) = oneshot::channel();
        let removed = CancellationToken::new();
        let _breaks = removed.clone().drop_guard();
        let stream = OfMember { stream, removed: Box::pin(removed.cancelled_owned()), _open: open };
        let taken = self.requests.send(Box::new(stream)).await;
        taken.map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "no request is taken"))?;
        let mut revisions = self.consensus.replica().revisions();
        loop {
            revisions.mark_unchanged();
            self.check_member(node)?;
            tokio::select! {
                biased;
                // The sender is only ever dropped.
                _ = &mut closed => return Ok(()),
                changed = revisions.changed() => if changed.is_err() { return Ok(()) },
            }
        }
    }

    async fn append(&self, stream: impl Stream, first: Frame, node: NodeId) -> io::Result<()> {
        let (mut reader, mut writer) = tokio::io::split(stream);
        let (requests, queue) = mpsc::channel(REQUESTS_AHEAD);
        let mut next = first.number;
        let mut read = async move {
            let mut frame = Some(first);
            while let Some(Frame { kind: Kind::Append, number, content }) = frame {
                self.check_member(node)?;
                if number != next {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "a request out of order"));
                }
                next = next.saturating_add(1);
                let request = Reader(&content).append()?;
                check_sender(node, request.vote.leader_id.node_id)?;
                if requests.send(request).await.is_err() {
                    return Ok(());
                }
                frame = frame::read(&mut reader).await?;
            }
            match frame {
                None => Ok(()),
                Some(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "not an append request")),
            }
        }
        .boxed()
        .fuse();
        let requests = stream::unfold(queue, async |mut queue| queue.recv().await.map(|r| (r, queue)));
        let mut answers =
            Box::pin(self.consensus.raft().stream_append(requests)).ready_chunks(REQUESTS_AHEAD);
        let mut number = 0_u64;
        let mut bytes = Vec::new();
        let write = async {
            while let Some(ready) = answers.next().await {
                bytes.clear();
                let mut refused = false;
                for answer in ready {
                    let answer = answer.map_err(|fatal| io::Error::other(fatal.to_string()))?;
                    refused |= answer.is_err();
                    frame::put(&mut bytes, Kind::Append, number, |out| {
                        codec::put_appended(out, &answer);
                        Ok(())
                    })?;
                    number = number.saturating_add(1);
                }
                writer.write_all(&bytes).await?;
                writer.flush().await?;
                if refused {
                    return Ok(());
                }
            }
            Ok::<(), io::Error>(())
        };
        let mut write = Box::pin(write);
        tokio::select! {
            biased;
            result = &mut write => result,
            result = &mut read => {
                result?;
                // No more requests: the answers to those that came are still sent.
                drop(read);
                write.await
            }
        }
    }

    async fn calls(&self, stream: impl Stream, first: Frame, node: NodeId) -> io::Result<()> {
        let (mut reader, mut writer) = tokio::io::split(stream);
        let (answers, mut queue) = mpsc::channel::<Vec<u8>>(CALLS_MAX);
        let room = Arc::new(Semaphore::new(CALLS_MAX));
        let write = async move {
            while let Some(mut bytes) = queue.recv().await {
                while let Ok(more) = queue.try_recv() {
                    bytes.extend_from_slice(&more);
                }
                writer.write_all(&bytes).await?;
                writer.flush().await?;
            }
            Ok::<(), io::Error>(())
        };
        let read = async {
            let mut frame = Some(first);
            while let Some(Frame { kind: Kind::Call, number, content }) = frame {
                self.check_member(node)?;
                let question = serde_json::from_slice(&content)?;
                let permit = Arc::clone(&room).acquire_owned().await.map_err(io::Error::other)?;
                let (server, answers) = (self.clone(), answers.clone());
                tokio::spawn(async move {
                    let answer = server.question(question, node).await;
                    let mut bytes = Vec::new();
                    let put = answer.and_then(|answer| {
                        frame::put(&mut bytes, Kind::Call, number, |out| {
                            out.extend_from_slice(&answer);
                            Ok(())
                        })
                    });
                    match put {
                        // Whoever asked may have gone.
                        Ok(()) => drop(answers.send(bytes).await),
                        Err(error) => tracing::warn!(node, "a question cannot be answered: {error}"),
                    }
                    drop(permit);
                });
                frame = frame::read(&mut reader).await?;
            }
            match frame {
                None => Ok(()),
                Some(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "not a question")),
            }
        };
        tokio::select! { biased; result = write => result, result = read => result }
    }

    async fn question(&self, question: Question, node: NodeId) -> io::Result<Vec<u8>> {
        let raft = self.consensus.raft();
        let failed = |error: String| io::Error::other(error);
        let answer = match question {
            Question::Vote(request) => {
                check_sender(node, request.vote.leader_id.node_id)?;
                serde_json::to_vec(&raft.vote(request).await.map_err(|e| failed(e.to_string()))?)
            }
            Question::PreVote(request) => {
                check_sender(node, request.vote.leader_id.node_id)?;
                serde_json::to_vec(&raft.pre_vote(request).await.map_err(|e| failed(e.to_string()))?)
            }
            Question::TransferLeader(request) => {
                let answer = raft.handle_transfer_leader(request).await;
                serde_json::to_vec(&answer.map_err(|e| failed(e.to_string()))?)
            }
            Question::Append(request) => {
                check_sender(node, request.vote.leader_id.node_id)?;
                let answer = raft.append_entries(request).await;
                serde_json::to_vec(&answer.map_err(|e| failed(e.to_string()))?)
            }
            Question::Propose(proposal) => {
                let answer = match self.consensus.propose_here(*proposal).await {
                    Ok((revision, outcome)) => Proposed::Applied { revision, outcome },
                    Err(ProposeError::NotLeader { leader, .. }) => Proposed::NotLeader { leader },
                    Err(ProposeError::Discarded) => Proposed::Discarded,
                    Err(ProposeError::Level { needs, has }) => Proposed::Level { needs, has },
                    Err(error) => Proposed::Stopped(error.to_string()),
                };
                serde_json::to_vec(&answer)
            }
            Question::ReadIndex => {
                let answer = match self.consensus.read_index_here().await {
                    Ok(index) => ReadIndex::Applied(index),
                    Err(ProposeError::NotLeader { leader, .. }) => ReadIndex::NotLeader { leader },
                    Err(error) => ReadIndex::Stopped(error.to_string()),
                };
                serde_json::to_vec(&answer)
            }
            Question::GiveUp(to) => serde_json::to_vec(&self.consensus.give_up(to, GIVE_UP_MAX).await.err()),
            Question::Beat { connected } => serde_json::to_vec(&self.consensus.heartbeat_of(
                node,
                connected,
                self.consensus.clock().boottime_ms(),
            )),
            Question::Connected => serde_json::to_vec(
                &self.consensus.pulse().holder().is_connected(self.consensus.clock().boottime_ms()),
            ),
            Question::Reach(other) => serde_json::to_vec(&self.consensus.reaches(other).await),
            Question::Unanswered { node, suspicion } => serde_json::to_vec(&self.consensus.unanswered(
                node,
                suspicion,
                self.consensus.clock().boottime_ms(),
            )),
        };
        Ok(answer?)
    }

    async fn snapshot(&self, mut stream: impl Stream, first: &Frame, node: NodeId) -> io::Result<()> {
        let begin: Begin = serde_json::from_slice(&first.content)?;
        check_sender(node, begin.vote.leader_id.node_id)?;
        let file = tempfile::tempfile_in(&self.folder)?;
        let data = snapshot::receive(&mut stream, file).await?;
        let snapshot = Snapshot { meta: begin.meta, snapshot: data };
        let answer = match self.consensus.raft().install_full_snapshot(begin.vote, snapshot).await {
            Ok(response) => Installed::Done(response),
            Err(error) => Installed::Failed(error.to_string()),
        };
        frame::write(&mut stream, Kind::SnapshotEnd, 0, &serde_json::to_vec(&answer)?).await?;
        stream.shutdown().await
    }
}

/// A connection of a member with requests of users, which breaks once the member is removed.
struct OfMember<S> {
    stream: S,
    removed: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Dropped with the connection.
    _open: oneshot::Sender<()>,
}

impl<S> OfMember<S> {
    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.removed.as_mut().poll(context) {
            Poll::Pending => Ok(()),
            Poll::Ready(()) => Err(io::Error::new(io::ErrorKind::ConnectionAborted, "its node was removed")),
        }
    }
}

impl<S: Stream> AsyncRead for OfMember<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl<S: Stream> AsyncWrite for OfMember<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// A member speaks for itself only.
fn check_sender(node: NodeId, claimed: NodeId) -> io::Result<()> {
    if node == claimed {
        return Ok(());
    }
    let text = format!("node {node} speaks in the name of node {claimed}");
    tracing::warn!("a message is refused: {text}");
    Err(io::Error::new(io::ErrorKind::InvalidData, text))
}
