"""Deep Mutual Learning. Zhang et al., CVPR 2018."""
from .base import Distiller, positive
from .parts import kl


class DML(Distiller):
    """Two networks learn together, each from the labels and from the other's predictions.

        L_s = weight_s * mean_b KL(p_t || p_s)    p_t a constant;  p = softmax(z)
        L_t = weight_t * mean_b KL(p_s || p_t)    p_s a constant

    The "teacher" learns the labels, too, and starts from random weights, or from those of --teacher-resume. Both learn
    from the predictions of one forward pass and move in one step; the paper lets the second look at the first again
    after its step.

    Defaults: the paper.

    weight_s: factor of what the student learns from the teacher
    weight_t: factor of what the teacher learns from the student
    """

    trains_teacher = True

    def __init__(self, student, teacher, *, weight_s=1.0, weight_t=1.0):
        super().__init__()
        positive(weight_s=weight_s, weight_t=weight_t)
        self.weight_s, self.weight_t = weight_s, weight_t

    def forward(self, s, t, batch):
        return {'dml_student': self.weight_s * kl(t.logits.detach(), s.logits),
                'dml_teacher': self.weight_t * kl(s.logits.detach(), t.logits)}
