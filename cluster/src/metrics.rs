//! Numbers for Prometheus: counters grow as things happen, gauges are read when somebody asks.

use std::collections::BTreeMap;
use std::time::Duration;

use prometheus::{
    HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

use crate::api::Api;
use crate::host::local::Link;

/// All of them.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    durations: HistogramVec,
    commands: IntCounterVec,
    vms: IntGaugeVec,
    health: IntGaugeVec,
    raft: IntGaugeVec,
    agent: IntGauge,
    report_age: IntGauge,
    blob_bytes: IntGauge,
}

/// Bounds of request durations in seconds: from a read in memory to a long wait.
const SECONDS: &[f64] = &[0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0];

impl Metrics {
    /// Registers all.
    ///
    /// # Errors
    /// A name is used twice: a fault of this program.
    pub fn new(node: &str) -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let made = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(made.clone()))?;
            Ok::<_, prometheus::Error>(made)
        };
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            let made = IntGaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(made.clone()))?;
            Ok::<_, prometheus::Error>(made)
        };
        let gauge = |name: &str, help: &str| {
            let made = IntGauge::new(name, help)?;
            registry.register(Box::new(made.clone()))?;
            Ok::<_, prometheus::Error>(made)
        };
        let options = HistogramOpts::new("blixard_request_seconds", "Time until the answer began, by route")
            .buckets(SECONDS.to_vec());
        let durations = HistogramVec::new(options, &["method", "route"])?;
        registry.register(Box::new(durations.clone()))?;
        let build =
            gauges("blixard_build_info", "Version and name of this node; always 1", &["version", "node"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION"), node]).set(1);
        Ok(Self {
            requests: counter("blixard_requests_total", "Requests answered", &["method", "route", "status"])?,
            durations,
            commands: counter(
                "blixard_commands_total",
                "Commands proposed by requests",
                &["command", "done"],
            )?,
            vms: gauges("blixard_vms", "VMs of the cluster by phase", &["phase"])?,
            health: gauges("blixard_vms_health", "VMs with a health check by what it found", &["health"])?,
            raft: gauges("blixard_raft", "Raft: term, indexes of log, leads, proposals", &["what"])?,
            agent: gauge("blixard_agent_up", "1 when the agent answers")?,
            report_age: gauge(
                "blixard_agent_report_age_ms",
                "Age of the agent's newest report, -1 for none",
            )?,
            blob_bytes: gauge("blixard_blob_bytes", "Bytes of images and kernels kept by this node")?,
            registry,
        })
    }

    /// A request was answered.
    pub fn request(&self, method: &str, route: &str, status: u16, time: Duration) {
        self.requests.with_label_values(&[method, route, &status.to_string()]).inc();
        self.durations.with_label_values(&[method, route]).observe(time.as_secs_f64());
    }

    /// A command was applied or refused.
    pub fn command(&self, kind: &str, done: bool) {
        self.commands.with_label_values(&[kind, if done { "true" } else { "false" }]).inc();
    }

    /// All numbers as text.
    ///
    /// # Errors
    /// They cannot be written: a fault of this program.
    pub fn text(&self, api: &Api) -> Result<String, prometheus::Error> {
        let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let numbers = api.consensus.numbers();
        for (what, value) in [
            ("term", numbers.term),
            ("last_log", numbers.last_log),
            ("committed", numbers.committed),
            ("applied", numbers.applied),
            ("purged", numbers.purged),
            ("snapshot", numbers.snapshot),
            ("leads", u64::from(numbers.leads)),
            ("proposals", numbers.proposals),
        ] {
            self.raft.with_label_values(&[what]).set(signed(value));
        }
        let mut phases: BTreeMap<String, i64> = BTreeMap::new();
        let mut health: BTreeMap<String, i64> = BTreeMap::new();
        for vm in api.consensus.replica().state().vms() {
            *phases.entry(vm.observed.phase.to_string()).or_default() += 1;
            if let Some(found) = &vm.observed.health {
                *health.entry(found.state.to_string()).or_default() += 1;
            }
        }
        self.health.reset();
        for (state, count) in health {
            self.health.with_label_values(&[state.as_str()]).set(count);
        }
        self.vms.reset();
        for (phase, count) in phases {
            self.vms.with_label_values(&[phase.as_str()]).set(count);
        }
        let host = api.local.host();
        self.agent.set(i64::from(host.link == Link::Up));
        self.report_age.set(host.seen.map_or(-1, |seen| signed(seen.age_ms())));
        self.blob_bytes.set(signed(api.importer.blobs().usage().0));
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}
