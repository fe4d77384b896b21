//! Answers the node: checks who asks and what, stores the plan, reports.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use blixard_agent_api::plan::{VMS_MAX, VOLUME_BYTES_MAX, VOLUME_BYTES_MIN};
use blixard_agent_api::request::OBSERVE_WAIT_MS_MAX;
use blixard_agent_api::{BlobRef, HostPlan, Problem, ProblemKind, Reply, Request, VmPlan};
use blixard_ipc::{Connection, IpcError, Listener, MESSAGE_BYTES_MAX, Message};
use blixard_netd_api::NicId;
use blixard_vmm_api::VmId;

use crate::guest_stream;
use crate::host::{Host, sentence};
use crate::launch;
use crate::lease;
use crate::store::StoreError;
use crate::{doctor, durable, vmm_stats};

/// Most connections at a time.
const CONNECTIONS_MAX: usize = 64;
/// Most copies of content at a time: the rest of the connections stay free for plans and reports.
const COPIES_MAX: usize = 4;
/// How long the node may take to read an answer.
const REPLY_TIME_MAX: Duration = Duration::from_secs(30);
/// Most networks of a plan.
const NETWORKS_MAX: usize = 1024;
/// Most contents that a plan names besides those of its VMs.
const BLOBS_MAX: usize = 100_000;
/// Name of the stored plan.
pub const PLAN_FILE: &str = "plan.json";

/// The server.
#[derive(Debug)]
pub struct Server {
    host: Arc<Host>,
    connections: AtomicUsize,
    copies: AtomicUsize,
    /// Held while a plan is stored: two plans at once would race to the file.
    storing: Mutex<()>,
}

/// One less when dropped.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn take(counter: &'a AtomicUsize, most: usize) -> Option<Self> {
        let counted = Self(counter);
        (counter.fetch_add(1, Ordering::AcqRel) < most).then_some(counted)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

type Answer = Result<(Reply, Option<OwnedFd>), Problem>;

fn refused(kind: ProblemKind, message: impl Into<String>) -> Problem {
    Problem { kind, message: message.into() }
}

impl Server {
    /// A server for this host.
    pub fn new(host: Arc<Host>) -> Arc<Self> {
        Arc::new(Self {
            host,
            connections: AtomicUsize::new(0),
            copies: AtomicUsize::new(0),
            storing: Mutex::new(()),
        })
    }

    /// Accepts connections for as long as the agent lives.
    ///
    /// # Errors
    /// Connections cannot be accepted any more.
    pub fn serve(self: &Arc<Self>, listener: &Listener) -> Result<(), IpcError> {
        loop {
            let connection = listener.accept()?;
            match connection.peer() {
                Ok(peer) if peer.uid == self.host.config.node_uid => {}
                Ok(peer) => {
                    tracing::warn!(peer.uid, peer.pid, "refused a connection that is not the node's");
                    continue;
                }
                Err(error) => {
                    tracing::warn!(error = sentence(&error), "refused a connection of nobody");
                    continue;
                }
            }
            let server = Arc::clone(self);
            let spawned = thread::Builder::new().name("request".into()).spawn(move || {
                let Some(_one) = Counted::take(&server.connections, CONNECTIONS_MAX) else {
                    let problem = refused(ProblemKind::Host, "too many requests at a time");
                    let _ = connection.send(&Reply::Refused(problem), &[], Instant::now() + REPLY_TIME_MAX);
                    return;
                };
                if let Err(error) = server.converse(&connection) {
                    tracing::debug!(error = sentence(&error), "connection ended");
                }
            });
            if let Err(error) = spawned {
                tracing::warn!(%error, "no thread for a connection");
            }
        }
    }

    fn converse(&self, connection: &Connection) -> Result<(), IpcError> {
        while let Some(message) = connection.receive(MESSAGE_BYTES_MAX, None)? {
            let (reply, passed) = match self.answer(message) {
                Ok(answer) => answer,
                Err(problem) => (Reply::Refused(problem), None),
            };
            let passed: Vec<BorrowedFd> = passed.iter().map(AsFd::as_fd).collect();
            connection.send(&reply, &passed, Instant::now() + REPLY_TIME_MAX)?;
        }
        Ok(())
    }

    fn answer(&self, message: Message) -> Answer {
        let request: Request = message.decode().map_err(|e| refused(ProblemKind::Invalid, sentence(&e)))?;
        let host = &self.host;
        let mut passed = message.descriptors.into_iter();
        match request {
            Request::Apply(plan) => {
                self.apply(plan)?;
                Ok((Reply::Report(Box::new(host.report_after(0, 0, Instant::now()))), None))
            }
            Request::Observe { agent_instance, revision, wait_ms } => {
                let wait = Duration::from_millis(wait_ms.min(OBSERVE_WAIT_MS_MAX));
                let report = host.report_after(agent_instance, revision, Instant::now() + wait);
                Ok((Reply::Report(Box::new(report)), None))
            }
            Request::Renew { until_ms, generation } => {
                lease::renew(host, until_ms, generation).map(|()| (Reply::Done, None))
            }
            Request::PutBlob(blob) => {
                let (Some(file), None) = (passed.next(), passed.next()) else {
                    return Err(refused(ProblemKind::Invalid, "exactly one descriptor is needed"));
                };
                self.put(&blob, file).map(|()| (Reply::Done, None))
            }
            Request::OpenExec { vm } => {
                self.running(vm, true)?;
                stream(guest_stream::exec(&host.config.sockets_of(vm)))
            }
            Request::OpenConsole { vm } => {
                self.running(vm, false)?;
                stream(guest_stream::console(&host.config.sockets_of(vm)))
            }
            Request::OpenLog { vm } => {
                self.known(vm)?;
                if !host.config.files_of(vm).join(launch::CONSOLE_LOG).exists() {
                    return Err(refused(ProblemKind::NotNow, "it has printed nothing yet"));
                }
                stream(guest_stream::log(&host.config.files_of(vm)))
            }
            Request::Metrics { vm } => {
                self.running(vm, false)?;
                let samples = vmm_stats::read(&host.config.sockets_of(vm))
                    .map_err(|error| refused(ProblemKind::Host, sentence(&error)))?;
                Ok((Reply::Metrics(samples), None))
            }
            Request::Doctor => Ok((Reply::Findings(doctor::examine(&host.config)), None)),
        }
    }

    fn put(&self, blob: &BlobRef, file: OwnedFd) -> Result<(), Problem> {
        let _one = Counted::take(&self.copies, COPIES_MAX)
            .ok_or_else(|| refused(ProblemKind::Host, "too many copies at a time"))?;
        self.host.store.put(blob, file).map_err(|error| {
            let kind = match error {
                StoreError::Io { .. } => ProblemKind::Host,
                _ => ProblemKind::Invalid,
            };
            refused(kind, sentence(&error))
        })?;
        self.host.content_changed();
        Ok(())
    }

    fn known(&self, vm: VmId) -> Result<(), Problem> {
        let known = self.host.core().vms.contains_key(&vm);
        if known { Ok(()) } else { Err(refused(ProblemKind::NotFound, format!("no VM {vm} here"))) }
    }

    fn running(&self, vm: VmId, ready: bool) -> Result<(), Problem> {
        self.known(vm)?;
        let core = self.host.core();
        let entry = core.vms.get(&vm);
        if entry.is_none_or(|v| v.process.is_none()) {
            return Err(refused(ProblemKind::NotNow, "it does not run"));
        }
        if ready && !entry.is_some_and(|v| v.status.as_ref().is_some_and(|s| s.guest_ready)) {
            return Err(refused(ProblemKind::NotNow, "its guest is not ready"));
        }
        Ok(())
    }

    fn apply(&self, plan: HostPlan) -> Result<(), Problem> {
        check(&plan).map_err(|message| refused(ProblemKind::Invalid, message))?;
        let _one_at_a_time = self.storing.lock().unwrap_or_else(PoisonError::into_inner);
        let stored = self.host.core().plan.clone();
        if let Some(stored) = stored {
            if plan.generation < stored.generation {
                let message = format!("plan {} is older than {}", plan.generation, stored.generation);
                return Err(refused(ProblemKind::Stale, message));
            }
            if *stored == plan {
                return Ok(());
            }
        }
        let text = serde_json::to_vec(&plan).map_err(|e| refused(ProblemKind::Host, sentence(&e)))?;
        durable::replace(&self.host.config.state.join(PLAN_FILE), &text)
            .map_err(|e| refused(ProblemKind::Host, format!("cannot store the plan: {e}")))?;
        tracing::info!(generation = plan.generation.0, vms = plan.vms.len(), "plan stored");
        self.host.core().set_plan(plan);
        self.host.wake.notify_one();
        Ok(())
    }
}

fn stream(opened: Result<OwnedFd, guest_stream::StreamError>) -> Answer {
    match opened {
        Ok(fd) => Ok((Reply::Stream, Some(fd))),
        Err(error) => Err(refused(ProblemKind::Host, sentence(&error))),
    }
}

/// Checks all that can be checked without looking at the host.
///
/// # Errors
/// What is wrong, as a sentence that names the VM or network and the field.
pub fn check(plan: &HostPlan) -> Result<(), String> {
    let mut networks = BTreeSet::new();
    if plan.vms.len() > VMS_MAX || plan.networks.len() > NETWORKS_MAX || plan.blobs.len() > BLOBS_MAX {
        return Err(format!("at most {VMS_MAX} VMs and {NETWORKS_MAX} networks are possible"));
    }
    for network in &plan.networks {
        network.validate().map_err(|problem| format!("network {:?}: {problem}", network.name))?;
        if !networks.insert(network.name.as_str()) {
            return Err(format!("network {:?}: named twice", network.name));
        }
    }
    let mut vms = BTreeSet::new();
    for vm in &plan.vms {
        check_vm(vm, &networks).map_err(|problem| format!("VM {}: {problem}", vm.vm))?;
        if !vms.insert(vm.vm) {
            return Err(format!("VM {}: planned twice", vm.vm));
        }
    }
    Ok(())
}

fn check_vm(vm: &VmPlan, networks: &BTreeSet<&str>) -> Result<(), String> {
    let size = vm.volume.size_bytes;
    if !(VOLUME_BYTES_MIN..=VOLUME_BYTES_MAX).contains(&size) || !size.is_multiple_of(1 << 20) {
        return Err(format!(
            "volume.size_bytes: {size} bytes; {VOLUME_BYTES_MIN} to {VOLUME_BYTES_MAX} in steps of 1 MiB are possible"
        ));
    }
    if let Some(nic) = &vm.nic {
        if !networks.contains(nic.spec.network.as_str()) {
            return Err(format!("nic.spec.network: the plan has no network {:?}", nic.spec.network));
        }
        if nic.spec.id != NicId::new(vm.vm, 0) {
            return Err("nic.spec.id: not the id of this VM's nic".into());
        }
    }
    launch::config(vm, 0, 1500).map(|_| ()).map_err(|error| error.to_string())
}
