//! The node that answers: version, health, doctor, metrics.

use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use blixard_agent_api::Phase;
use blixard_agent_api::request::FindingState;
use blixard_api::server::{Finding, Health, Version};

use super::error::Failure;
use super::query::Parameters;
use super::{Api, Shared, answer};
use crate::host::local::Link;
use crate::vm_metrics;

/// `GET /v1/version`
pub async fn version(State(api): State<Shared>, request: Request) -> Result<Response, Failure> {
    Parameters::of(request.uri(), &[])?;
    let (revision, feature_level) = {
        let state = api.consensus.replica().state();
        (state.revision(), state.cluster().map_or(0, |cluster| cluster.feature_level))
    };
    let version =
        Version { version: env!("CARGO_PKG_VERSION").into(), node: api.node_name.clone(), feature_level };
    Ok(answer(StatusCode::OK, revision, &version))
}

/// `GET /v1/health`
pub async fn health(State(api): State<Shared>, request: Request) -> Result<Response, Failure> {
    Parameters::of(request.uri(), &[])?;
    let health = api.health();
    let status = if health.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let revision = api.consensus.replica().state().revision();
    Ok(answer(status, revision, &health))
}

impl Api {
    fn health(&self) -> Health {
        let leader = self.consensus.leader();
        let host = self.local.host();
        let mut problems = Vec::new();
        if leader.is_none() {
            problems.push("no leader is known".to_owned());
        }
        if let Link::Down { reason } = &host.link {
            problems.push(format!("the agent does not answer: {reason}"));
        }
        problems.extend(host.trouble.clone());
        if let Some(seen) = &host.seen {
            problems.extend(seen.report.problems.iter().cloned());
        }
        // Without its agent a node still answers; what VMs do is then old, and says how old.
        Health { ready: leader.is_some(), leader, agent: host.link == Link::Up, problems }
    }
}

/// `GET /v1/doctor`
pub async fn doctor(State(api): State<Shared>, request: Request) -> Result<Response, Failure> {
    Parameters::of(request.uri(), &[])?;
    let mut findings = Vec::new();
    match api.ask_agent(|agent| agent.doctor()).await {
        Ok(found) => findings.extend(found.into_iter().map(|f| Finding {
            check: f.check,
            state: state_name(f.state).into(),
            found: f.found,
            fix: f.fix,
        })),
        Err(failure) => findings.push(Finding {
            check: "agent".into(),
            state: "bad".into(),
            found: failure.body.message,
            fix: failure.body.suggestion,
        }),
    }
    let (bytes, free) = (api.importer.blobs().usage().0, api.importer.blobs().free_bytes());
    let low = free.is_some_and(|free| free < crate::images::FREE_BYTES_MIN);
    findings.push(Finding {
        check: "space for images".into(),
        state: if low { "bad" } else { "ok" }.into(),
        found: free.map_or_else(
            || format!("{} MiB used, free space unknown", bytes >> 20),
            |free| format!("{} MiB used, {} MiB free", bytes >> 20, free >> 20),
        ),
        fix: low.then(|| "remove images that are no longer needed: blixard image rm NAME".into()),
    });
    let revision = *api.consensus.replica().revisions().borrow();
    Ok(answer(StatusCode::OK, revision, &findings))
}

fn state_name(state: FindingState) -> &'static str {
    match state {
        FindingState::Ok => "ok",
        FindingState::Warning => "warning",
        FindingState::Bad => "bad",
    }
}

/// `GET /metrics`
pub async fn metrics(State(api): State<Shared>, request: Request) -> Result<Response, Failure> {
    Parameters::of(request.uri(), &[])?;
    let wrong = |error: prometheus::Error| Failure::internal(error.to_string());
    let mut text = api.metrics.text(&api).map_err(wrong)?;
    let seen = api.local.host().seen;
    let reported = seen.iter().flat_map(|seen| &seen.report.vms);
    let vms: Vec<_> = reported.filter(|vm| vm.phase == Phase::Running).map(|vm| vm.vm).collect();
    text += &api.ask_agent(move |agent| Ok(vm_metrics::text(agent, &vms))).await?.map_err(wrong)?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}
