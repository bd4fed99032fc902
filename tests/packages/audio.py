"""torchaudio and speechbrain."""

from __future__ import annotations

import torchaudio
from speechbrain.lobes.models import CRDNN, ECAPA_TDNN, Xvector
from torch import nn

from packages.subject import images, subject, waves

wave = subject((4000,), waves(4000), package="torchaudio")
features = subject((40, 20), images(40, 20), package="speechbrain")


@wave
def wav2vec2_small() -> nn.Module:
    return torchaudio.models.wav2vec2_model(
        extractor_mode="group_norm", extractor_conv_layer_config=[(16, 10, 5), (16, 8, 4)],
        extractor_conv_bias=False, encoder_embed_dim=16, encoder_projection_dropout=0.1,
        encoder_pos_conv_kernel=8, encoder_pos_conv_groups=2, encoder_num_layers=2,
        encoder_num_heads=2, encoder_attention_dropout=0.1, encoder_ff_interm_features=32,
        encoder_ff_interm_dropout=0.1, encoder_dropout=0.1, encoder_layer_norm_first=False,
        encoder_layer_drop=0.1, aux_num_out=5,
    )  # fmt: skip


@subject((1, 2000), waves(1, 2000), package="torchaudio")
def wav2letter() -> nn.Module:
    return torchaudio.models.Wav2Letter(num_classes=5, num_features=1)


@subject((1, 20, 40), images(1, 20, 40), package="torchaudio")
def deep_speech() -> nn.Module:
    return torchaudio.models.DeepSpeech(n_feature=40, n_hidden=16, n_class=5)


@subject((1, 2000), waves(1, 2000), package="torchaudio")
def conv_tasnet() -> nn.Module:
    return torchaudio.models.ConvTasNet(
        num_sources=2, enc_num_feats=16, msk_num_feats=8, msk_num_hidden_feats=16,
        msk_num_layers=2, msk_num_stacks=1,
    )  # fmt: skip


@wave
def mel_spectrogram() -> nn.Module:
    return nn.Sequential(
        torchaudio.transforms.MelSpectrogram(n_fft=256, n_mels=20),
        torchaudio.transforms.AmplitudeToDB(top_db=80),
    )


@features
def ecapa_tdnn() -> nn.Module:
    return ECAPA_TDNN.ECAPA_TDNN(
        20, channels=[16, 16, 16, 16, 48], attention_channels=8, lin_neurons=8
    )


# Its statistics pooling adds noise of 1e-5 in evaluation mode too.
@subject((40, 20), images(40, 20), package="speechbrain", draws=True)
def x_vector() -> nn.Module:
    return Xvector.Xvector(
        in_channels=20, tdnn_blocks=2, tdnn_channels=[16, 16], tdnn_kernel_sizes=[5, 3],
        tdnn_dilations=[1, 2], lin_neurons=8,
    )  # fmt: skip


@features
def crdnn() -> nn.Module:
    return CRDNN.CRDNN(
        input_size=20, cnn_channels=(8, 8), rnn_layers=1, rnn_neurons=8, dnn_neurons=8,
        time_pooling_size=2,
    )  # fmt: skip
