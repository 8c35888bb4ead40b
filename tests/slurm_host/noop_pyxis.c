/* A SPANK plugin that accepts pyxis' container flags and does nothing, so that srun lines with containers run without. */
#include <slurm/spank.h>
#include <stdlib.h>

SPANK_PLUGIN(pyxis, 1)

static const char *with_value[] = {"container-image", "container-mounts", "container-workdir", "container-name"};
static const char *flags[] = {"no-container-mount-home", "container-mount-home", "container-writable"};

static int ignore(int value, const char *argument, int remote) { return 0; }

static int add(spank_t spank, const char *name, int has_value, int index) {
  struct spank_option option = {(char *)name, has_value ? "X" : NULL, "as pyxis has it", has_value, index, ignore};
  return spank_option_register(spank, &option) ? -1 : 0;
}

int slurm_spank_init(spank_t spank, int argc, char **argv) {
  int index, failed = 0;
  for (index = 0; index < 4; index++) failed |= add(spank, with_value[index], 1, index);
  for (index = 0; index < 3; index++) failed |= add(spank, flags[index], 0, 100 + index);
  return failed;
}
