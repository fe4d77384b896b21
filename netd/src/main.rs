//! `blixard-netd`: keeps CAP_NET_ADMIN, drops the rest, serves the agent.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use blixard_ipc::Listener;
use blixard_netd::{Node, privileges, server};
use clap::Parser;
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt,
};
use tracing_subscriber::EnvFilter;

/// The networks of one Blixard node: bridges, TAPs, addresses and packet filter.
///
/// Needs CAP_NET_ADMIN, /dev/net/tun and the program nft. Listens on the socket that systemd passes, or on --socket.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// Unix socket to listen on; without it, a socket passed by systemd is expected.
    #[arg(long, env = "BLIXARD_NETD_SOCKET")]
    socket: Option<PathBuf>,
    /// User that may connect: the agent's.
    #[arg(long, default_value_t = 0)]
    agent_uid: u32,
}

fn main() -> ExitCode {
    let options = Options::parse();
    // RUST_LOG is the ecosystem's name for it.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> anyhow::Result<()> {
    // First of all: a passed descriptor has a fixed number, and the path of a socket may need more than CAP_NET_ADMIN.
    let listener = match &options.socket {
        Some(path) => Listener::bind(path, 0o660)?,
        None => passed_listener()?,
    };
    privileges::reduce()?;
    let node = Node::open()?;
    // Without systemd there is nobody to tell.
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::debug!(%error, "cannot tell systemd that netd is ready");
    }
    tracing::info!(agent_uid = options.agent_uid, "serving");
    server::serve(&listener, options.agent_uid, node)?;
    Ok(())
}

fn passed_listener() -> anyhow::Result<Listener> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    let (pid, count) = (number("LISTEN_PID"), number("LISTEN_FDS"));
    anyhow::ensure!(
        pid == Some(std::process::id()) && count == Some(1),
        "no socket: give --socket PATH, or start netd by a systemd socket unit with one ListenSequentialPacket="
    );
    let socket = blixard_netd::raw::take_passed_descriptor();
    let name = "the descriptor passed by systemd is no socket";
    let listens = getsockopt(&socket, sockopt::AcceptConn).context(name)?;
    let kind = getsockopt(&socket, sockopt::SockType).context(name)?;
    let address: SockaddrStorage = getsockname(std::os::fd::AsRawFd::as_raw_fd(&socket)).context(name)?;
    anyhow::ensure!(
        listens && kind == SockType::SeqPacket && address.family() == Some(AddressFamily::Unix),
        "the socket passed by systemd is not a listening unix socket for sequential packets"
    );
    nix::fcntl::fcntl(&socket, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))
        .context(name)?;
    Ok(Listener::from(socket))
}
