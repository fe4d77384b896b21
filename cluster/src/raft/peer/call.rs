//! Questions to another member: each has a number, many are under way over one connection, answers come in any order.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::frame::{self, Kind};
use super::{Dialer, Stream};
use crate::auth::tls::CONNECT_MAX;
use crate::liveness::EntryId;
use crate::raft::types::Types;
use crate::state::{NodeId, Outcome, Proposal};

/// Most questions under way to one member.
pub const CALLS_MAX: usize = 1024;
/// Frames that are collected before they are written.
const WRITE_BYTES_MAX: usize = 256 << 10;

/// What one member asks another.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Question {
    /// For its vote.
    Vote(openraft::raft::VoteRequest<Types>),
    /// Whether it would give its vote.
    PreVote(openraft::raft::VoteRequest<Types>),
    /// To stand for election at once.
    TransferLeader(openraft::raft::TransferLeaderRequest<Types>),
    /// One append request, outside of a lane.
    Append(openraft::raft::AppendEntriesRequest<Types>),
    /// To propose a command, as the leader.
    Propose(Box<Proposal>),
    /// How far a linearizable read must have applied the log, as the leader.
    ReadIndex,
    /// To let this voter lead, as the leader. Answered with nothing once another member leads, which may be a third one, or
    /// with the reason why not.
    GiveUp(NodeId),
    /// To answer a heartbeat of the asking node, as a voter: [`Beaten`].
    Beat {
        /// A majority of the voters replies to the asking node.
        connected: bool,
    },
    /// Whether a majority of the voters replies to the asked node.
    Connected,
    /// Whether this node can be reached from the asked one, and says that a majority of the voters replies to it.
    Reach(NodeId),
    /// For how long it has not answered the heartbeats of a node, as a voter: [`Unanswered`].
    Unanswered {
        /// Which node.
        node: NodeId,
        /// Revision of the suspicion that it must have applied.
        suspicion: u64,
    },
}

/// What is answered to [`Question::Beat`].
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Beaten {
    /// The node is up in the voter's applied state.
    pub answered: bool,
    /// How far the voter had applied the log.
    pub revision: u64,
    /// The entry by which it knew who votes.
    pub electorate: EntryId,
}

/// What is answered to [`Question::Unanswered`].
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Unanswered {
    /// For how long in milliseconds; absent when it has not applied this suspicion, or no longer knows it.
    pub for_ms: Option<u64>,
    /// The entry by which it knew who votes.
    pub electorate: EntryId,
}

/// What is answered to [`Question::Propose`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Proposed {
    /// It was applied, as the entry with this index.
    Applied {
        /// Revision.
        revision: u64,
        /// What applying it answered.
        outcome: Outcome,
    },
    /// The member does not lead; nothing was done.
    NotLeader {
        /// Who does, as far as it knows.
        leader: Option<NodeId>,
    },
    /// The cluster does not know the command yet; nothing was done.
    Level {
        /// The feature level that it needs.
        needs: u32,
        /// The feature level of the cluster.
        has: u32,
    },
    /// Another leader was elected before it was agreed: it may have been applied, or may still be.
    Discarded,
    /// The member cannot say what became of it.
    Stopped(String),
}

/// What is answered to [`Question::ReadIndex`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReadIndex {
    /// Index that must be applied before the read.
    Applied(u64),
    /// The member does not lead, or no longer.
    NotLeader {
        /// Who does, as far as it knows.
        leader: Option<NodeId>,
    },
    /// The member cannot say.
    Stopped(String),
}

/// A question that was not answered for so long, while nothing else came either, ends its connection. After a cut the system sends
/// again only after pauses that grew with the cut; a new connection is there sooner. Questions with less time say nothing: the
/// other end may be busy.
const SILENCE_MAX: Duration = Duration::from_secs(1);

type Answers = Arc<Mutex<BTreeMap<u64, oneshot::Sender<Vec<u8>>>>>;

/// A connection for questions. It lives as long as the task that reads from it.
#[derive(Clone)]
struct Line {
    frames: mpsc::Sender<Vec<u8>>,
    answers: Answers,
    /// When something came last.
    heard: Arc<Mutex<Instant>>,
}

/// A connection that comes about, or is there, or did not come about. It goes on when nobody waits for it any more: questions may
/// have less time than a handshake takes.
type Dial = Shared<BoxFuture<'static, Result<Line, Arc<io::Error>>>>;

/// Asks one member; connects when there is something to ask.
pub struct Caller {
    dialer: Dialer,
    node: NodeId,
    known: Option<String>,
    dial: Mutex<Option<Dial>>,
    next: AtomicU64,
}

impl Caller {
    pub(super) fn new(dialer: Dialer, node: NodeId, known: Option<String>) -> Self {
        Self { dialer, node, known, dial: Mutex::default(), next: AtomicU64::new(1) }
    }

    /// Asks, and waits for the answer at most this long.
    ///
    /// # Errors
    /// The member cannot be reached (`NotConnected`: nothing was sent), does not answer in time, or answers something else.
    pub async fn ask<T: DeserializeOwned>(&self, question: &Question, time: Duration) -> io::Result<T> {
        let content = serde_json::to_vec(question)?;
        let mut asked = None;
        let ask = async {
            let line = self.line().await?;
            asked = Some((line.clone(), Instant::now()));
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let (answer, answered) = oneshot::channel();
            {
                let mut answers = line.answers.lock().unwrap_or_else(PoisonError::into_inner);
                answers.retain(|_, waiting| !waiting.is_closed());
                if answers.len() >= CALLS_MAX {
                    return Err(io::Error::new(io::ErrorKind::WouldBlock, "too many questions under way"));
                }
                answers.insert(number, answer);
            }
            let mut bytes = Vec::with_capacity(content.len().saturating_add(16));
            frame::put(&mut bytes, Kind::Call, number, |out| {
                out.extend_from_slice(&content);
                Ok(())
            })?;
            line.frames.send(bytes).await.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
            answered.await.map_err(|_| io::Error::from(io::ErrorKind::ConnectionReset))
        };
        let answer = tokio::time::timeout(time, ask).await;
        if let (Err(_), Some((line, since))) = (&answer, asked) {
            self.leave_if_silent(&line, since);
        }
        let answer = answer.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        Ok(serde_json::from_slice(&answer)?)
    }

    /// Gives up a line on which a question from `since` was not answered, when nothing else came.
    fn leave_if_silent(&self, line: &Line, since: Instant) {
        let heard = *line.heard.lock().unwrap_or_else(PoisonError::into_inner);
        if since.elapsed() < SILENCE_MAX || heard > since {
            return;
        }
        let mut dial = self.dial.lock().unwrap_or_else(PoisonError::into_inner);
        // Another question may have given it up before, and there is a new one.
        let same =
            |dial: &Dial| matches!(dial.peek(), Some(Ok(now)) if Arc::ptr_eq(&now.answers, &line.answers));
        if dial.as_ref().is_some_and(same) {
            tracing::debug!(node = self.node, "nothing comes from another node: its connection is given up");
            *dial = None;
        }
    }

    async fn line(&self) -> io::Result<Line> {
        let dial = {
            let mut dial = self.dial.lock().unwrap_or_else(PoisonError::into_inner);
            let usable = |dial: &&Dial| match dial.peek() {
                None => true,
                Some(Ok(line)) => !line.frames.is_closed(),
                Some(Err(_)) => false,
            };
            match dial.as_ref().filter(usable) {
                Some(dial) => dial.clone(),
                None => dial.insert(self.dial()).clone(),
            }
        };
        dial.await.map_err(|error| io::Error::new(io::ErrorKind::NotConnected, error))
    }

    fn dial(&self) -> Dial {
        let (dialer, node, known) = (self.dialer.clone(), self.node, self.known.clone());
        let dial = async move {
            let stream = tokio::time::timeout(CONNECT_MAX, dialer.connect(node, known.as_deref())).await;
            stream
                .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
                .map(|stream| Line::new(stream, node))
        };
        let dialled = tokio::spawn(dial).map(|ended| match ended {
            Ok(line) => line.map_err(Arc::new),
            // The node stops.
            Err(error) => Err(Arc::new(io::Error::other(error))),
        });
        dialled.boxed().shared()
    }
}

impl Line {
    fn new(stream: Box<dyn Stream>, node: NodeId) -> Self {
        let (mut reader, mut writer) = tokio::io::split(stream);
        let (frames, mut queue) = mpsc::channel::<Vec<u8>>(CALLS_MAX);
        let answers = Answers::default();
        let heard = Arc::new(Mutex::new(Instant::now()));
        let (waiting, hears) = (Arc::clone(&answers), Arc::clone(&heard));
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
                *hears.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
                let mut answers = waiting.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(answer) = answers.remove(&frame.number) {
                    // Whoever asked may have given up.
                    answer.send(frame.content).ok();
                }
            }
            Ok::<(), io::Error>(())
        };
        let ended = Arc::clone(&answers);
        tokio::spawn(async move {
            let result = tokio::select! { biased; result = write => result, result = read => result };
            if let Err(error) = result {
                tracing::debug!(node, "the connection to another node ended: {error}");
            }
            // Everybody who waits is told by the end of the sender.
            ended.lock().unwrap_or_else(PoisonError::into_inner).clear();
        });
        Self { frames, answers, heard }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::clock::Clock;
    use crate::raft::peer::Connect;
    use crate::raft::replica::Replica;
    use crate::state::State;

    /// A way on which a handshake takes a while, to a member that answers `null` to as many questions on a connection.
    struct Slow {
        handshake: Duration,
        answers: usize,
        /// It closes the connection then, or else says nothing more.
        closes: bool,
        dialled: AtomicUsize,
    }

    impl Connect for Slow {
        fn connect(&self, _: NodeId, _: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn Stream>>> {
            self.dialled.fetch_add(1, Ordering::Relaxed);
            async {
                tokio::time::sleep(self.handshake).await;
                let (ours, mut theirs) = tokio::io::duplex(1 << 10);
                let (answers, closes) = (self.answers, self.closes);
                tokio::spawn(async move {
                    for _ in 0..answers {
                        let Ok(Some(question)) = frame::read(&mut theirs).await else { return };
                        frame::write(&mut theirs, Kind::Call, question.number, b"null").await.unwrap();
                    }
                    if !closes {
                        std::future::pending::<()>().await;
                    }
                });
                Ok(Box::new(ours) as Box<dyn Stream>)
            }
            .boxed()
        }
    }

    fn caller(handshake_ms: u64, answers: usize, closes: bool) -> (Caller, Arc<Slow>) {
        let handshake = Duration::from_millis(handshake_ms);
        let way = Arc::new(Slow { handshake, answers, closes, dialled: AtomicUsize::new(0) });
        let replica = Arc::new(Replica::new(State::default(), Clock::default()));
        let dialer = Dialer { replica, way: Some(Arc::clone(&way) as Arc<dyn Connect>) };
        (Caller::new(dialer, 2, Some("127.0.0.1:1".into())), way)
    }

    async fn ask(caller: &Caller, ms: u64) -> io::Result<()> {
        caller.ask(&Question::Connected, Duration::from_millis(ms)).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_handshake_that_takes_longer_than_a_question_serves_the_next_ones() {
        let (caller, way) = caller(120, usize::MAX, true);
        for _ in 0..2 {
            assert_eq!(ask(&caller, 50).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        }
        ask(&caller, 50).await.unwrap();
        ask(&caller, 50).await.unwrap();
        assert_eq!(way.dialled.load(Ordering::Relaxed), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_ended_or_takes_too_long_is_made_anew() {
        let (short, way) = caller(1, 1, true);
        ask(&short, 50).await.unwrap();
        // The other end has gone, which is noticed when the reader is next polled.
        tokio::time::sleep(Duration::from_millis(1)).await;
        ask(&short, 50).await.unwrap();
        assert_eq!(way.dialled.load(Ordering::Relaxed), 2);

        let (never, way) = caller(3_600_000, 1, true);
        assert_eq!(ask(&never, 5000).await.unwrap_err().kind(), io::ErrorKind::NotConnected);
        assert_eq!(ask(&never, 500).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(way.dialled.load(Ordering::Relaxed), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_on_which_a_long_question_is_not_answered_is_made_anew_and_a_short_one_leaves_it() {
        let (caller, way) = caller(1, 2, false);
        ask(&caller, 50).await.unwrap();
        ask(&caller, 50).await.unwrap();
        // The other end reads no more, as behind a cut: the connection stays.
        ask(&caller, 50).await.unwrap_err();
        assert_eq!(way.dialled.load(Ordering::Relaxed), 1);
        ask(&caller, 2000).await.unwrap_err();
        ask(&caller, 50).await.unwrap();
        assert_eq!(way.dialled.load(Ordering::Relaxed), 2);
    }
}
