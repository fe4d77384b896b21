//! An agent without a host, for benchmarks: `agent SOCKET` does at once whatever the node's plans say, until its standard input
//! is closed.

use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, Result};
use blixard_tests::sim_agent::{Manner, SimAgent};

fn main() -> Result<()> {
    let socket: PathBuf = std::env::args().nth(1).context("agent SOCKET")?.into();
    let _agent = SimAgent::start(&socket, Manner::Prompt)?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
