//! What the VMMs of this node count, as Prometheus text: counters and histograms by VM, device and queue.
//!
//! Read from the agent when somebody asks, and forgotten afterwards. The number of VMs is bounded; how many were left out is
//! shown too.

use blixard_api::VmId;
use blixard_vmm_api::stats::{Histogram, Sample, Value};
use prometheus::{IntCounterVec, IntGauge, Opts, Registry, TextEncoder};

use crate::host::Agent;

/// Most VMs whose numbers are shown.
pub const VMS_MAX: usize = 256;

const LABELS: [&str; 4] = ["vm", "device", "queue", "what"];
const BUCKET_LABELS: [&str; 5] = ["vm", "device", "queue", "what", "le"];

/// Asks `agent` for the numbers of each of `vms` and writes them down. VMs that do not answer are counted as left out.
///
/// # Errors
/// They cannot be written: a fault of this program.
pub fn text(agent: &dyn Agent, vms: &[VmId]) -> Result<String, prometheus::Error> {
    let mut shown = vec![];
    for vm in vms.iter().take(VMS_MAX) {
        if let Ok(samples) = agent.metrics(*vm) {
            shown.push((*vm, samples));
        }
    }
    write(&shown, vms.len() - shown.len())
}

fn write(vms: &[(VmId, Vec<Sample>)], left_out: usize) -> Result<String, prometheus::Error> {
    let registry = Registry::new();
    let family = |name: &str, help: &str, labels: &[&str]| {
        let family = IntCounterVec::new(Opts::new(name, help), labels)?;
        registry.register(Box::new(family.clone()))?;
        Ok::<_, prometheus::Error>(family)
    };
    let counts = family("blixard_vm_device_total", "What a VMM counted, by device and queue", &LABELS)?;
    let buckets = family(
        "blixard_vm_device_histogram_bucket",
        "Values up to a size, by device and queue",
        &BUCKET_LABELS,
    )?;
    let sums = family("blixard_vm_device_histogram_sum", "Sum of these values", &LABELS)?;
    let numbers = family("blixard_vm_device_histogram_count", "Number of these values", &LABELS)?;
    let missing =
        IntGauge::new("blixard_vms_without_numbers", "VMs of this node whose numbers are not here")?;
    missing.set(i64::try_from(left_out).unwrap_or(i64::MAX));
    registry.register(Box::new(missing))?;
    for (vm, samples) in vms {
        let vm = vm.to_string();
        for sample in samples {
            let queue = sample.queue.map(|queue| queue.to_string()).unwrap_or_default();
            let labels = [vm.as_str(), &sample.device, &queue, &sample.name];
            match &sample.value {
                Value::Count(count) => counts.with_label_values(&labels).inc_by(*count),
                Value::Histogram(histogram) => {
                    sums.with_label_values(&labels).inc_by(histogram.sum);
                    numbers.with_label_values(&labels).inc_by(histogram.count());
                    for (bound, count) in cumulative(histogram) {
                        let [vm, device, queue, what] = labels;
                        buckets.with_label_values(&[vm, device, queue, what, &bound]).inc_by(count);
                    }
                }
            }
        }
    }
    TextEncoder::new().encode_to_string(&registry.gather())
}

/// Bounds and how many values are at most as large, up to the last bucket in use and without bound.
fn cumulative(histogram: &Histogram) -> Vec<(String, u64)> {
    let mut sum = 0u64;
    let mut list = vec![];
    for (index, count) in histogram.buckets.iter().enumerate() {
        sum = sum.saturating_add(*count);
        if let Some(bound) = Histogram::bound(index) {
            list.push((bound.to_string(), sum));
        }
    }
    list.push(("+Inf".to_owned(), sum));
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_and_cumulative_histograms_have_their_labels() {
        let vm = VmId::from_u128(7);
        let sample =
            |queue, name: &str, value| Sample { device: "net.nic0".into(), queue, name: name.into(), value };
        let histogram = Histogram { sum: 9, buckets: vec![1, 0, 3] };
        let samples = vec![
            sample(None, "sent_bytes", Value::Count(12)),
            sample(Some(1), "batch", Value::Histogram(histogram)),
        ];
        let text = write(&[(vm, samples)], 2).unwrap();
        for line in [
            format!(
                r#"blixard_vm_device_total{{device="net.nic0",queue="",vm="{vm}",what="sent_bytes"}} 12"#
            ),
            format!(
                r#"blixard_vm_device_histogram_bucket{{device="net.nic0",le="0",queue="1",vm="{vm}",what="batch"}} 1"#
            ),
            format!(
                r#"blixard_vm_device_histogram_bucket{{device="net.nic0",le="3",queue="1",vm="{vm}",what="batch"}} 4"#
            ),
            format!(
                r#"blixard_vm_device_histogram_bucket{{device="net.nic0",le="+Inf",queue="1",vm="{vm}",what="batch"}} 4"#
            ),
            format!(
                r#"blixard_vm_device_histogram_sum{{device="net.nic0",queue="1",vm="{vm}",what="batch"}} 9"#
            ),
            "blixard_vms_without_numbers 2".to_owned(),
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
