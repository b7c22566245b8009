//! The EC2 instance types that the pipeline can run on.

#[derive(Debug, Clone, Copy)]
pub struct InstanceType {
    pub name: &'static str,
    pub vcpus: u64,
    /// Memory in MiB, as EC2 lists it.
    pub memory_mib: u64,
    pub gpus: usize,
}

const fn kind(name: &'static str, vcpus: u64, memory_gib: u64, gpus: usize) -> InstanceType {
    InstanceType {
        name,
        vcpus,
        memory_mib: memory_gib * 1024,
        gpus,
    }
}

/// From EC2's list of accelerated and small general-purpose instances.
const KNOWN: [InstanceType; 16] = [
    kind("g4dn.xlarge", 4, 16, 1),
    kind("g4dn.2xlarge", 8, 32, 1),
    kind("g4dn.4xlarge", 16, 64, 1),
    kind("g4dn.12xlarge", 48, 192, 4),
    kind("g5.xlarge", 4, 16, 1),
    kind("g5.2xlarge", 8, 32, 1),
    kind("g5.4xlarge", 16, 64, 1),
    kind("g5.12xlarge", 48, 192, 4),
    kind("g6.xlarge", 4, 16, 1),
    kind("g6.2xlarge", 8, 32, 1),
    kind("g6.4xlarge", 16, 64, 1),
    kind("g6e.xlarge", 4, 32, 1),
    kind("g6e.2xlarge", 8, 64, 1),
    kind("p3.2xlarge", 8, 61, 1),
    kind("m5.large", 2, 8, 0),
    kind("c5.xlarge", 4, 8, 0),
];

impl InstanceType {
    /// Looks a type up by name. An unknown one is taken for the smallest with a
    /// GPU, since a template may name types newer than this list.
    pub fn named(name: &str) -> InstanceType {
        KNOWN
            .into_iter()
            .find(|kind| kind.name == name)
            .unwrap_or(KNOWN[0])
    }

    /// CPU units that ECS registers: 1,024 per virtual CPU.
    pub fn cpu_units(&self) -> u64 {
        self.vcpus * 1024
    }

    /// Memory that ECS registers. The kernel and the agent keep some: a
    /// g4dn.xlarge with 16,384 MiB registers less than that, which is why a
    /// task definition that asks for all of it is never placed.
    pub fn registered_memory_mib(&self) -> u64 {
        self.memory_mib * 95 / 100
    }
}
