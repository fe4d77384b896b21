//! The way to other members: frames over mutually authenticated TLS.
//!
//! * [`frame`]: length-prefixed frames, bounded
//! * [`lane`]: append requests one after the other, answers in the same order, many under way
//! * [`call`]: questions with answers, many at once over one connection
//! * [`snapshot`]: a snapshot, record by record
//! * [`content`]: images and kernels by digest
//! * [`client`]: what openraft sends through
//! * [`server`]: what other members send
//!
//! To each member there is at most one connection for replication, one for heartbeats, one for questions, one while a
//! snapshot or content is sent, and one for each request of a user that is passed on.

pub mod call;
pub mod client;
pub mod content;
pub mod frame;
pub mod lane;
pub mod server;
pub mod snapshot;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite};

use self::call::Caller;
use super::Consensus;
use super::replica::Replica;
use crate::auth::tls::Tls;
use crate::state::NodeId;

/// A connection to another member. Who is at the other end is certain.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for S {}

/// How connections to other members come about.
pub trait Connect: Send + Sync {
    /// A connection to this node at this address.
    fn connect(&self, node: NodeId, address: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn Stream>>>;
}

impl Connect for Tls {
    fn connect(&self, node: NodeId, address: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn Stream>>> {
        let connecting = self.connect(node, address);
        async { Ok(Box::new(connecting.await?) as Box<dyn Stream>) }.boxed()
    }
}

/// Connects to other members.
#[derive(Clone)]
pub struct Dialer {
    replica: Arc<Replica>,
    way: Option<Arc<dyn Connect>>,
}

/// The way to other members: new connections, and those for questions. Clones share them.
#[derive(Clone)]
pub struct Peers {
    dialer: Dialer,
    callers: Arc<Mutex<BTreeMap<NodeId, Arc<Caller>>>>,
}

impl Dialer {
    /// The address of a member: where it said that it is, or else where it was when it became a member.
    fn address(&self, node: NodeId, known: Option<&str>) -> io::Result<SocketAddr> {
        let said = self.replica.state().node(node).and_then(|record| record.address);
        said.or_else(|| known?.parse().ok()).ok_or_else(|| {
            let text = format!("the address of node {node} is not known");
            io::Error::new(io::ErrorKind::AddrNotAvailable, text)
        })
    }

    async fn connect(&self, node: NodeId, known: Option<&str>) -> io::Result<Box<dyn Stream>> {
        let way = self.way.as_ref().ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotConnected, "this node has no keys for other nodes")
        })?;
        way.connect(node, self.address(node, known)?).await
    }

    fn knows(&self, node: NodeId) -> bool {
        self.replica.state().node(node).is_some()
    }
}

impl Peers {
    /// Goes this way to the members that the replica knows. Without keys there is none.
    pub fn new(replica: Arc<Replica>, way: Option<Arc<dyn Connect>>) -> Self {
        Self { dialer: Dialer { replica, way }, callers: Arc::default() }
    }

    /// Questions to a member. `known` is where it was when it became one.
    pub fn caller(&self, node: NodeId, known: Option<&str>) -> Arc<Caller> {
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        // Members leave for good; nobody else holds the way to one that has left.
        callers.retain(|other, caller| {
            *other == node || Arc::strong_count(caller) > 1 || self.dialer.knows(*other)
        });
        let caller = callers
            .entry(node)
            .or_insert_with(|| Arc::new(Caller::new(self.dialer.clone(), node, known.map(str::to_owned))));
        Arc::clone(caller)
    }
}

impl Consensus {
    /// A connection to another member over which HTTP/1.1 is spoken: requests of users about VMs there.
    ///
    /// # Errors
    /// The member cannot be reached.
    pub async fn requests_to(&self, node: NodeId) -> io::Result<Box<dyn Stream>> {
        let mut stream = self.peers.dialer.connect(node, None).await?;
        frame::write(&mut stream, frame::Kind::Requests, 0, &[]).await?;
        Ok(stream)
    }
}
