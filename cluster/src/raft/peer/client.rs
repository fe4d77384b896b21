//! What openraft sends through to one member.

use std::future::Future;
use std::io;
use std::time::Duration;

use futures::{FutureExt, Stream, StreamExt};
use openraft::alias::SnapshotOf;
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{Backoff, RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::{BasicNode, OptionalSend};
use serde::de::DeserializeOwned;

use super::Peers;
use super::call::Question;
use super::lane::{Lane, RETRY};
use super::snapshot::{self, Begin, Installed};
use crate::raft::state_store::SnapshotData;
use crate::raft::types::{Types, Vote};
use crate::state::NodeId;

/// Longest wait for an answer to a question of openraft: an answer that comes later is of no use to an election.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// One member.
pub struct Peer {
    peers: Peers,
    node: NodeId,
    known: String,
    lane: Lane,
}

impl RaftNetworkFactory<Types> for Peers {
    type Network = Peer;

    async fn new_client(&mut self, target: NodeId, node: &BasicNode) -> Peer {
        let lane = Lane::new(self.dialer.clone(), target, node.addr.clone());
        Peer { peers: self.clone(), node: target, known: node.addr.clone(), lane }
    }
}

fn rpc(error: &io::Error) -> RPCError<Types> {
    match error.kind() {
        // The connection was there: try again at once.
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            RPCError::Network(NetworkError::new(error))
        }
        _ => RPCError::Unreachable(Unreachable::new(error)),
    }
}

impl Peer {
    async fn ask<T: DeserializeOwned>(&self, question: Question) -> Result<T, RPCError<Types>> {
        let caller = self.peers.caller(self.node, Some(&self.known));
        caller.ask(&question, ANSWER_MAX).await.map_err(|error| rpc(&error))
    }
}

impl RaftNetworkV2<Types> for Peer {
    type SnapshotData = SnapshotData;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<Types>,
        _: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, RPCError<Types>> {
        self.ask(Question::Append(request)).await
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        _: RPCOption,
    ) -> BoxFuture<
        's,
        Result<BoxStream<'s, Result<StreamAppendResult<Types>, RPCError<Types>>>, RPCError<Types>>,
    >
    where
        S: Stream<Item = AppendEntriesRequest<Types>> + OptionalSend + Unpin + 'static,
    {
        async move {
            let session = self.lane.session(input).await.map_err(|error| rpc(&error))?;
            let answers: BoxStream<'s, _> = session.map(|answer| answer.map_err(|error| rpc(&error))).boxed();
            Ok(answers)
        }
        .boxed()
    }

    async fn vote(
        &mut self,
        request: VoteRequest<Types>,
        _: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        self.ask(Question::Vote(request)).await
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<Types>,
        _: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        self.ask(Question::PreVote(request)).await
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<Types>,
        _: RPCOption,
    ) -> Result<TransferLeaderResponse<Types>, RPCError<Types>> {
        self.ask(Question::TransferLeader(request)).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: SnapshotOf<Types, SnapshotData>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let unreachable = |error: &io::Error| StreamingError::Unreachable(Unreachable::new(error));
        let connected = self.peers.dialer.connect(self.node, Some(&self.known)).await;
        let mut stream = connected.map_err(|error| unreachable(&error))?;
        let begin = Begin { vote, meta: snapshot.meta };
        match snapshot::send(&mut stream, &begin, snapshot.snapshot, cancel).await {
            Err(error) => Err(unreachable(&error)),
            Ok(Err(closed)) => Err(StreamingError::Closed(closed)),
            Ok(Ok(Installed::Done(response))) => Ok(response),
            Ok(Ok(Installed::Failed(reason))) => Err(unreachable(&io::Error::other(reason))),
        }
    }

    fn backoff(&self) -> Option<Backoff> {
        Some(Backoff::new(std::iter::repeat(RETRY)))
    }
}
