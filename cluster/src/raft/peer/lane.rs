//! Append requests to one member over one connection: many are under way, answers come in their order.
//!
//! openraft sends in sessions, one after the other. A session that is left with requests under way does no harm: the
//! connection stays, and answers to requests of an earlier session are recognised by their number and left out.

use std::io;
use std::time::Duration;

use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt};
use openraft::raft::{AppendEntriesRequest, StreamAppendResult};
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::frame::{self, Frame, Kind};
use super::{Dialer, Stream as Connection};
use crate::raft::codec::{self, Reader};
use crate::raft::types::Types;
use crate::state::NodeId;

/// Most requests under way.
const WINDOW: u64 = 64;
/// Pause before a member that could not be reached is tried again: it may be back within an election timeout.
pub(super) const RETRY: Duration = Duration::from_millis(100);
/// Longest wait for the answer to the oldest request. A member whose disk hangs for longer is as good as cut off.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Frames that are collected before they are written.
const WRITE_BYTES_MAX: usize = 256 << 10;

/// The open connection.
struct Line {
    frames: mpsc::Sender<Vec<u8>>,
    answers: mpsc::UnboundedReceiver<Frame>,
    /// Number of the next request.
    next: u64,
    /// Number of the request whose answer comes next.
    awaited: u64,
}

/// Append requests to one member; connects when there is something to send.
pub struct Lane {
    dialer: Dialer,
    node: NodeId,
    known: String,
    line: Option<Line>,
    /// A connection that comes about. It outlives the session that asked for it: a heartbeat waits for less time than a
    /// handshake may take on a busy host.
    connecting: Option<JoinHandle<io::Result<Box<dyn Connection>>>>,
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "the other node closed the connection")
}

impl Lane {
    pub(super) fn new(dialer: Dialer, node: NodeId, known: String) -> Self {
        Self { dialer, node, known, line: None, connecting: None }
    }

    /// A connection that works, as far as is known.
    async fn open(&mut self) -> io::Result<()> {
        if self.line.as_ref().is_some_and(|line| !line.frames.is_closed()) {
            return Ok(());
        }
        self.line = None;
        let connecting = self.connecting.get_or_insert_with(|| {
            let (dialer, node, known) = (self.dialer.clone(), self.node, self.known.clone());
            tokio::spawn(async move { dialer.connect(node, Some(&known)).await })
        });
        let connected = connecting.await;
        self.connecting = None;
        let stream = match connected.map_err(io::Error::other).flatten() {
            Ok(stream) => stream,
            Err(error) => {
                // openraft pauses when it is asked for the first request, and none is asked for without a connection.
                tokio::time::sleep(RETRY).await;
                return Err(error);
            }
        };
        let (mut reader, mut writer) = tokio::io::split(stream);
        let (frames, mut queue) = mpsc::channel::<Vec<u8>>(64);
        // Bounded by the requests: one answer for each.
        let (answered, answers) = mpsc::unbounded_channel();
        let write = async move {
            while let Some(mut bytes) = queue.recv().await {
                while bytes.len() < WRITE_BYTES_MAX {
                    let Ok(more) = queue.try_recv() else { break };
                    bytes.extend_from_slice(&more);
                }
                writer.write_all(&bytes).await?;
                writer.flush().await?;
            }
            Ok::<(), io::Error>(())
        };
        let read = async move {
            while let Some(frame) = frame::read(&mut reader).await? {
                if frame.kind != Kind::Append || answered.send(frame).is_err() {
                    break;
                }
            }
            Ok::<(), io::Error>(())
        };
        let node = self.node;
        tokio::spawn(async move {
            let result = tokio::select! { biased; result = write => result, result = read => result };
            if let Err(error) = result {
                tracing::debug!(node, "the connection for replication ended: {error}");
            }
        });
        self.line = Some(Line { frames, answers, next: 0, awaited: 0 });
        Ok(())
    }

    /// Sends requests as they come and answers as they come. Ends after the answer to the last request, after an answer
    /// that is a refusal, and after an error.
    pub(super) async fn session<'s, S>(
        &'s mut self,
        input: S,
    ) -> io::Result<BoxStream<'s, io::Result<StreamAppendResult<Types>>>>
    where
        S: Stream<Item = AppendEntriesRequest<Types>> + Send + Unpin + 'static,
    {
        self.open().await?;
        let first = self.line.as_ref().map_or(0, |line| line.next);
        let session = Session { lane: self, input: Some(input), first, done: false };
        Ok(stream::unfold(session, Session::step).boxed())
    }
}

struct Session<'s, S> {
    lane: &'s mut Lane,
    /// Gone once it has ended.
    input: Option<S>,
    /// Number of the first request of this session.
    first: u64,
    done: bool,
}

impl<S> Session<'_, S>
where
    S: Stream<Item = AppendEntriesRequest<Types>> + Send + Unpin + 'static,
{
    async fn step(mut self) -> Option<(io::Result<StreamAppendResult<Types>>, Self)> {
        if self.done {
            return None;
        }
        let answer = self.next().await.transpose()?;
        if !matches!(answer, Ok(Ok(_))) {
            // After a refusal the other end reads no further requests of this connection.
            self.lane.line = None;
            self.done = true;
        }
        Some((answer, self))
    }

    async fn next(&mut self) -> io::Result<Option<StreamAppendResult<Types>>> {
        let line = self.lane.line.as_mut().ok_or_else(gone)?;
        loop {
            let under_way = line.next.saturating_sub(line.awaited);
            if self.input.is_none() && line.awaited >= line.next {
                return Ok(None);
            }
            let input = &mut self.input;
            let request = async {
                match input.as_mut() {
                    Some(input) => input.next().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                frame = line.answers.recv() => {
                    let frame = frame.ok_or_else(gone)?;
                    if frame.number != line.awaited {
                        return Err(io::Error::new(io::ErrorKind::InvalidData, "an answer out of order"));
                    }
                    line.awaited = line.awaited.saturating_add(1);
                    if frame.number >= self.first {
                        return Reader(&frame.content).appended().map(Some);
                    }
                }
                request = request, if under_way < WINDOW => match request {
                    None => self.input = None,
                    Some(request) => {
                        let mut bytes = Vec::with_capacity(512);
                        frame::put(&mut bytes, Kind::Append, line.next, |out| codec::put_append(out, &request))?;
                        line.frames.send(bytes).await.map_err(|_| gone())?;
                        line.next = line.next.saturating_add(1);
                    }
                },
                () = tokio::time::sleep(ANSWER_MAX), if under_way > 0 => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
        }
    }
}
