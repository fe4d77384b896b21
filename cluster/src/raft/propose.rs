//! Commands and linearizable reads from any member: the leader does them, other members ask it, one hop at most.

use std::io;
use std::time::Duration;

use openraft::ReadPolicy;
use openraft::errors::{ClientWriteError, LinearizableReadError, RaftError};
use openraft::type_config::async_runtime::watch::WatchReceiver;
use tokio::time::Instant;

use super::peer::call::{Proposed, Question, ReadIndex};
use super::types::{Applied, Command};
use super::{Consensus, Ordering};
use crate::state::{NodeId, Outcome, Proposal};

/// How long a request waits for a leader: an election and its first entry take less than a second.
const LEADER_MAX: Duration = Duration::from_secs(3);
/// Longest wait for the leader's answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Pause before a leader is looked for again that said it is none.
const PAUSE: Duration = Duration::from_millis(20);

/// Why a command was not applied, as far as this node knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Another node leads, or none does.
    #[error("{}", no_leader(name.as_deref()))]
    NotLeader {
        /// Number of the leader, when known.
        leader: Option<NodeId>,
        /// Its name.
        name: Option<String>,
    },
    /// The cluster does not know the command yet.
    #[error("this needs feature level {needs}, the cluster has {has}")]
    Level {
        /// What it needs.
        needs: u32,
        /// What the cluster has.
        has: u32,
    },
    /// Another leader was elected before it was agreed, and this member's log follows that one: the command may have been
    /// applied, or may still be.
    #[error("another leader was elected before it was agreed")]
    Discarded,
    /// The leader was asked and did not answer: the command may have been applied.
    #[error("the leader did not answer: {0}")]
    Unknown(String),
    /// This node's consensus has stopped: its disk failed, or the process is ending.
    #[error("consensus has stopped: {0}")]
    Stopped(String),
}

/// That a leader cannot be reached, or that none is known.
pub(super) fn no_leader(name: Option<&str>) -> String {
    name.map_or_else(
        || "no leader is known: too few voters can be reached".to_owned(),
        |name| format!("node {name} leads and cannot be reached"),
    )
}

impl Consensus {
    /// Proposes a command, through the leader when that is another member, and answers what applying it answered, with the
    /// revision of it. This member has applied it too when it returns. After an error the command may still be applied later,
    /// except with [`ProposeError::NotLeader`] and [`ProposeError::Level`].
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub async fn propose(&self, proposal: Proposal) -> Result<(u64, Outcome), ProposeError> {
        self.proposals.fetch_add(1, Ordering::Relaxed);
        let deadline = Instant::now() + LEADER_MAX;
        let repeats = proposal.key.is_some() || proposal.command.may_be_repeated();
        loop {
            let refused = match self.leader_id() {
                Some(leader) if leader != self.node => {
                    let question = Question::Propose(Box::new(proposal.clone()));
                    match self.ask::<Proposed>(leader, &question).await {
                        Ok(Proposed::Applied { revision, outcome }) => {
                            self.applied(revision).await?;
                            return Ok((revision, outcome));
                        }
                        Ok(Proposed::NotLeader { leader }) => self.not_leader(leader),
                        Ok(Proposed::Discarded) if repeats => ProposeError::Discarded,
                        Ok(Proposed::Discarded) => return Err(ProposeError::Discarded),
                        Ok(Proposed::Level { needs, has }) => return Err(ProposeError::Level { needs, has }),
                        Ok(Proposed::Stopped(reason)) => return Err(ProposeError::Unknown(reason)),
                        // Nothing was sent.
                        Err(error) if error.kind() == io::ErrorKind::NotConnected => {
                            self.not_leader(Some(leader))
                        }
                        Err(error) => return Err(ProposeError::Unknown(error.to_string())),
                    }
                }
                _ => match self.propose_here(proposal.clone()).await {
                    Err(error @ ProposeError::NotLeader { .. }) => error,
                    Err(error @ ProposeError::Discarded) if repeats => error,
                    other => return other,
                },
            };
            self.leader_changes(deadline, refused).await?;
        }
    }

    /// Proposes a command as the leader.
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub async fn propose_here(&self, proposal: Proposal) -> Result<(u64, Outcome), ProposeError> {
        let needs = proposal.command.level();
        // Only a cluster that exists has a level.
        let has = self.replica.state().cluster().map_or(u32::MAX, |cluster| cluster.feature_level);
        if needs > has {
            return Err(ProposeError::Level { needs, has });
        }
        let stopped = |reason: String| ProposeError::Stopped(reason);
        let command = Command::new(proposal).map_err(|error| stopped(error.to_string()))?;
        let written = tokio::time::timeout(ANSWER_MAX, self.raft.client_write(command)).await;
        let written = written.map_err(|_| ProposeError::Unknown("too few voters answered it".into()))?;
        match written {
            Ok(response) => match response.data {
                Applied::Command(outcome) => Ok((response.log_id.index, *outcome)),
                Applied::Nothing => Err(stopped("the entry came back without an answer".into())),
            },
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(forward))) => {
                Err(self.not_leader(forward.leader_id))
            }
            Err(RaftError::APIError(ClientWriteError::LogEntryDiscarded(_))) => Err(ProposeError::Discarded),
            Err(error) => Err(stopped(error.to_string())),
        }
    }

    /// Waits until reading this member's state is linearizable: it then holds everything that was acknowledged anywhere
    /// before this was called. Writes nothing to the log.
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub async fn linearize(&self) -> Result<(), ProposeError> {
        let deadline = Instant::now() + LEADER_MAX;
        loop {
            let refused = match self.leader_id() {
                Some(leader) if leader != self.node => {
                    match self.ask::<ReadIndex>(leader, &Question::ReadIndex).await {
                        Ok(ReadIndex::Applied(index)) => return self.applied(index).await,
                        Ok(ReadIndex::NotLeader { leader }) => self.not_leader(leader),
                        Ok(ReadIndex::Stopped(reason)) => return Err(ProposeError::Unknown(reason)),
                        Err(_) => self.not_leader(Some(leader)),
                    }
                }
                _ => match self.read_index_here().await {
                    Ok(index) => return self.applied(index).await,
                    Err(error @ ProposeError::NotLeader { .. }) => error,
                    Err(error) => return Err(error),
                },
            };
            self.leader_changes(deadline, refused).await?;
        }
    }

    /// How far a linearizable read must have applied the log, as the leader: a majority confirms that it still is.
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub async fn read_index_here(&self) -> Result<u64, ProposeError> {
        let confirmed =
            tokio::time::timeout(LEADER_MAX, self.raft.get_read_linearizer(ReadPolicy::ReadIndex)).await;
        let confirmed = confirmed.map_err(|_| ProposeError::Unknown("too few voters answered it".into()))?;
        match confirmed {
            Ok(linearizer) => Ok(linearizer.read_log_id().index()),
            Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward))) => {
                Err(self.not_leader(forward.leader_id))
            }
            Err(RaftError::APIError(_)) => Err(self.not_leader(None)),
            Err(error) => Err(ProposeError::Stopped(error.to_string())),
        }
    }

    async fn ask<T: serde::de::DeserializeOwned>(
        &self,
        leader: NodeId,
        question: &Question,
    ) -> io::Result<T> {
        self.ask_member(leader, question, ANSWER_MAX).await
    }

    async fn applied(&self, index: u64) -> Result<(), ProposeError> {
        let mut revisions = self.replica.revisions();
        let reached = revisions.wait_for(|revision| *revision >= index);
        match tokio::time::timeout(ANSWER_MAX, reached).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(ProposeError::Stopped("the state has ended".into())),
            Err(_) => Err(ProposeError::Unknown(format!("entry {index} has not arrived here"))),
        }
    }

    fn not_leader(&self, leader: Option<NodeId>) -> ProposeError {
        ProposeError::NotLeader { leader, name: leader.map(|id| self.name_of(id)) }
    }

    /// Waits for another answer to the question who leads; gives `refused` back when the time is over.
    async fn leader_changes(&self, deadline: Instant, refused: ProposeError) -> Result<(), ProposeError> {
        let mut metrics = self.raft.server_metrics();
        let before = metrics.borrow_and_update().current_leader;
        let change = async {
            // A leader that has just been elected says so a little later, and one that has just died is still named.
            tokio::time::sleep(PAUSE).await;
            while before.is_none() && metrics.borrow_watched().current_leader.is_none() {
                if metrics.changed().await.is_err() {
                    break;
                }
            }
        };
        if Instant::now() >= deadline || tokio::time::timeout_at(deadline, change).await.is_err() {
            return Err(refused);
        }
        Ok(())
    }
}
