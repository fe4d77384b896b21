//! `blixard-node`: reads its settings, runs the node, ends it in good order on SIGTERM or SIGINT.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::Context;
use blixard_node::config::Options;
use blixard_node::node;
use clap::Parser;
use mimalloc::MiMalloc;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// musl's own allocator has one lock for all threads, and a node that is asked much spent a tenth of its time in it.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Time that threads which wait for the agent have at the end: what they wait for is of no use any more.
const END_TIME_MAX: Duration = Duration::from_millis(200);

/// What is logged when `BLIXARD_LOG` says nothing else. openraft warns many times a second of a member that does not answer; that
/// it is suspected or down, and when it is back, is said once by ourselves.
const LOG: &str = "info,openraft=warn,openraft::raft::responder=error,openraft::core::heartbeat=error,\
    openraft::replication=error,openraft::engine::handler::replication_handler=error";

fn main() -> anyhow::Result<()> {
    let config = Options::parse().complete()?;
    let filter = EnvFilter::try_from_env("BLIXARD_LOG").unwrap_or_else(|_| EnvFilter::new(LOG));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    // The allocator asks for huge pages; what many small records leave unused of them was a quarter of the node's memory.
    if let Err(error) = nix::sys::prctl::set_thp_disable(true) {
        tracing::debug!("huge pages stay: {error}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.context("cannot start the runtime")?;
    let result = runtime.block_on(async {
        let stop = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
        let asked = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::info!("stopping");
            asked.cancel();
        });
        let ready = || {
            // Without a service manager there is nobody to tell.
            if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
                tracing::debug!("the service manager was not told: {error}");
            }
        };
        node::run(config, stop, ready).await.context("blixard-node cannot run")
    });
    runtime.shutdown_timeout(END_TIME_MAX);
    result
}
