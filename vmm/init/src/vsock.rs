//! Sockets between guest and host (vsock(7)).

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use blixard_vmm_api::guest::{EXEC_PORT, LINK_PORT};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, connect, getpeername, listen, socket,
};

use crate::exec::Executor;
use crate::{console, sys};

/// The host (`VMADDR_CID_HOST`).
const HOST: u32 = 2;
/// Any context id of ours (`VMADDR_CID_ANY`).
const ANY: u32 = u32::MAX;
/// How long to wait for a command to end when there is nothing left to accept one more with.
const PAUSE: Duration = Duration::from_millis(200);

fn open() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?)
}

/// Connects to the host's end of the guest link.
///
/// # Errors
/// There is no vsock device, or the host does not listen.
pub fn connect_link() -> io::Result<OwnedFd> {
    let socket = open()?;
    connect(socket.as_raw_fd(), &VsockAddr::new(HOST, LINK_PORT))?;
    Ok(socket)
}

/// Listens for exec streams and serves them from a thread of its own.
///
/// # Errors
/// There is no vsock in the kernel.
pub fn serve_exec(executor: Arc<Executor>) -> io::Result<()> {
    let listener = open()?;
    bind(listener.as_raw_fd(), &VsockAddr::new(ANY, EXEC_PORT))?;
    listen(&listener, Backlog::new(128)?)?;
    std::thread::Builder::new().name("accept".into()).spawn(move || accept_for_ever(&listener, &executor))?;
    Ok(())
}

fn accept_for_ever(listener: &OwnedFd, executor: &Arc<Executor>) {
    loop {
        match sys::accept(listener.as_fd()) {
            Ok(connection) => {
                // With the loopback transport a process of the guest could connect too, and would become root.
                let peer = getpeername::<VsockAddr>(connection.as_raw_fd());
                if peer.is_ok_and(|peer| peer.cid() == HOST) {
                    executor.serve(connection);
                }
            }
            Err(error) => {
                console::line(&format!("accepting an exec stream: {error}"));
                executor.wait_for_room(PAUSE);
            }
        }
    }
}
