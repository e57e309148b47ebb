"""What there is to measure: name -> function from Settings to a Case, one line each."""
from .cifar_data import cifar_data
from .cifar_kd import cifar_kd
from .cifar_run import cifar_run
from .features import mv2_features
from .loader import loader
from .memory import memory
from .methods import methods
from .mgd_flow import flow_assignment, flow_tracking
from .mgd_step import mgd_overhead, mgd_step
from .scaling import scaling
from .throughput import throughput, throughput_device

CASES = {
    'mgd-step': mgd_step,
    'mgd-overhead': mgd_overhead,
    'mv2-features': mv2_features,
    'flow-tracking': flow_tracking,
    'flow-assignment': flow_assignment,
    'memory': memory,
    'methods': methods,
    'scaling': scaling,
    'cifar-kd': cifar_kd,
    'cifar-run': cifar_run,
    'cifar-data': cifar_data,
    'loader': loader,
    'throughput': throughput,
    'throughput-device': throughput_device,
}
